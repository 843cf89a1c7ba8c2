"""From scored paths to one answer. Every path with an answer votes once, duplicates too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .aggregate import display_score, path_score
from .answers import answer_key, extract_answer
from .types import SearchNode

VOTES = ("max", "weighted", "softmax", "majority")


@dataclass
class Election:
    answer: str | None
    best: SearchNode | None  # of the winning answer's paths, the one to show
    votes: dict[str, float]  # heaviest first
    num_voted: int


def weights(nodes: Sequence[SearchNode], aggregate: str | None, vote: str) -> list[float]:
    """One non-negative weight per path.

    "majority": 1. "weighted": the path score, which must be in [0, 1]. "softmax": exp(score), for unbounded
    scores. Products and softmax weights are relative to the largest, so long chains keep their proportions.
    """
    if vote not in VOTES:
        raise ValueError(f"vote must be one of {', '.join(VOTES)}, got {vote!r}")
    if vote == "majority":
        return [1.0] * len(nodes)
    scores = [path_score(node, aggregate) for node in nodes]
    if vote == "max" or not scores:
        return scores
    if aggregate == "product" or vote == "softmax":
        top = max(scores)
        return [math.exp(score - top) if score > -math.inf else 0.0 for score in scores]
    for score in scores:
        if score > -math.inf and not 0 <= score <= 1:
            raise ValueError(
                f'vote="weighted" needs scores in [0, 1], got {score:.4g}; use vote="softmax" or "max"'
            )
    return [max(score, 0.0) for score in scores]


def elect(nodes: Sequence[SearchNode], aggregate: str | None, vote: str) -> Election:
    """Let the paths that ended by themselves vote. Ties go to the answer with the smallest path key.

    "max" takes the answer of the single best path; its `votes` hold each answer's best path score.
    `best` is the highest-scored path of the winning answer (the first one by path key if scores are not
    used).
    """
    voters = sorted((node for node in nodes if node.solved), key=lambda node: node.path_key)
    voters = [(node, answer) for node in voters if (answer := extract_answer(node.path_text())) is not None]
    if not voters:
        return Election(None, None, {}, 0)
    weight = weights([node for node, _ in voters], aggregate, vote)
    groups: dict[str, list[int]] = {}  # insertion order is path-key order
    for i, (_, answer) in enumerate(voters):
        groups.setdefault(answer_key(answer), []).append(i)
    total = max if vote == "max" else math.fsum
    tally = {key: total([weight[i] for i in members]) for key, members in groups.items()}
    winner = max(tally, key=tally.__getitem__)  # max keeps the first of equals
    best = max(groups[winner], key=weight.__getitem__)
    names = {key: voters[members[0]][1] for key, members in groups.items()}
    ordered = sorted(tally, key=tally.__getitem__, reverse=True)
    shown = {key: display_score(tally[key], aggregate) if vote == "max" else tally[key] for key in ordered}
    return Election(
        names[winner], voters[best][0], {names[key]: value for key, value in shown.items()}, len(voters)
    )
