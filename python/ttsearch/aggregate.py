"""Path score from step scores; a product is kept as its logarithm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from .types import SearchNode

AGGREGATES = ("product", "min", "mean", "last")


def log_product(scores: Sequence[float]) -> float:
    """Sum of logarithms: a chain of forty steps does not underflow, an exact zero gives -inf."""
    for score in scores:
        if not 0 <= score <= 1:
            raise ValueError(
                f'aggregate="product" needs step scores in [0, 1], got {score:.4g}; '
                'this verifier is unbounded: use aggregate="min", "mean" or "last"'
            )
    return sum(math.log(score) if score else -math.inf for score in scores)


_RULES: dict[str, Callable[[Sequence[float]], float]] = {
    "product": log_product,
    "min": min,
    "mean": lambda scores: math.fsum(scores) / len(scores),
    "last": lambda scores: scores[-1],
}


def path_score(node: SearchNode, aggregate: str | None) -> float:
    """Score of the path that ends in `node`; higher is better. "product" gives its logarithm.

    A path the verifier refused (too long for it) scores -inf, and so does one without any text, or of which no step has
    a score because its verifications failed; a path with some scored steps is judged by those.

    Raises:
        ValueError: no rule given, a step has no score, or the rule cannot take these scores.
    """
    if aggregate not in _RULES:
        raise ValueError(f"aggregate must be one of {', '.join(AGGREGATES)}, got {aggregate!r}")
    running = node.running
    if running is not None and node.finish_reason != "refused":
        if not running.count:
            return -math.inf
        if aggregate != "product":
            return getattr(running, aggregate)
        if running.bounded:
            return running.log_product
    scores = node.step_scores()
    if node.finish_reason == "refused" or not scores:
        return -math.inf
    if None in scores:
        raise ValueError(
            f"step {scores.index(None) + 1} of path {node.path_key} has no score; attach a verifier, "
            'or use a strategy that needs none ("greedy", "majority")'
        )
    for score in scores:
        if math.isnan(score):
            raise ValueError(
                f"a step of path {node.path_key} scored NaN; the verifier is broken (check its dtype)"
            )
    return float(_RULES[aggregate](scores))


def ranked(nodes: Sequence[SearchNode], aggregate: str | None) -> list[SearchNode]:
    """Best path first; ties go to the smallest path key, so the order never depends on timing."""
    return sorted(nodes, key=lambda node: (-path_score(node, aggregate), node.path_key))


def display_score(score: float, aggregate: str | None) -> float:
    """A path score as people read it: the product itself, not its logarithm."""
    return math.exp(score) if aggregate == "product" else score
