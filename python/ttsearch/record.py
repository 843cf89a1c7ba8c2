"""From a finished or interrupted search to its result and its JSON record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .aggregate import display_score, path_score
from .answers import extract_answer
from .budget import Budget
from .protocols import Policy
from .types import Problem, SearchNode, SearchResult
from .vote import elect


def conclude(
    problem: Problem,
    policy: Policy,
    budget: Budget,
    candidates: Sequence[SearchNode],
    *,
    strategy: str,
    aggregate: str | None,
    vote: str,
) -> SearchResult:
    """The result of a search: let the candidates vote, count duplicates, show the best path.

    If no candidate has an answer, `best` is the best-scored unfinished one (the first one if there are no
    scores).
    """
    candidates = sorted(candidates, key=lambda node: node.path_key)
    election = elect(candidates, aggregate, vote)
    best = election.best or _best_unfinished(candidates, aggregate)
    duplicates = len(candidates) - len({node.path_text() for node in candidates})
    return SearchResult(
        problem,
        strategy,
        budget,
        election.answer,
        best,
        candidates,
        election.votes,
        election.num_voted,
        duplicates,
        cost=policy.cost(),
        root=policy.root,
    )


def _best_unfinished(candidates: Sequence[SearchNode], aggregate: str | None) -> SearchNode | None:
    scored = [
        node for node in candidates if node.finish_reason != "refused" and None not in node.step_scores()
    ]
    if aggregate is None or not scored:
        return candidates[0] if candidates else None
    return min(scored, key=lambda node: (-path_score(node, aggregate), node.path_key))


def result_to_dict(result: SearchResult) -> dict[str, Any]:
    """JSON-ready: numbers that JSON cannot hold (infinities) become None."""
    aggregate = result.budget.aggregate
    return {
        "id": result.problem.id,
        "prompt": result.problem.prompt,
        "gold": result.problem.answer,
        "level": result.problem.level,
        "strategy": result.strategy,
        "answer": result.answer,
        "votes": {answer: _finite(weight) for answer, weight in result.votes.items()},
        "num_voted": result.num_voted,
        "duplicates": result.duplicates,
        "interrupted": result.interrupted,
        "best": list(result.best.path_key) if result.best else None,
        "candidates": [_candidate(node, aggregate) for node in result.candidates],
        "budget": result.budget.to_dict(),
        "cost": cost_to_dict(result.cost),
        "seconds": round(result.seconds, 6),
    }


def cost_to_dict(cost) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(cost) | {"flops": cost.flops}


def _candidate(node: SearchNode, aggregate: str | None) -> dict[str, Any]:
    scores = node.step_scores()
    score = (
        path_score(node, aggregate)
        if aggregate and (None not in scores or node.finish_reason == "refused")
        else None
    )
    return {
        "path": list(node.path_key),
        "text": node.path_text(),
        "answer": extract_answer(node.path_text()) if node.solved else None,
        "steps": [step.text for step in node.path()],
        "step_scores": [_finite(step.step_score) for step in node.path()],
        "path_score": _finite(display_score(score, aggregate)) if score is not None else None,
        "finish_reason": node.finish_reason,
        "finished": node.finished,
        "num_tokens": node.path_tokens(),
        "logprob": _finite(math.fsum(step.logprob for step in node.path())),
    }


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None
