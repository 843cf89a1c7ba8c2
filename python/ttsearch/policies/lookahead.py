"""Which children of an `expand` under way will be continued, before all of them are there."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Literal

from ..aggregate import ranked
from ..types import SearchNode

Speculate = Literal["off", "sure", "likely"]
SPECULATE: tuple[Speculate, ...] = ("off", "sure", "likely")


def next_parents(
    done: Sequence[SearchNode], total: int, width: int, aggregate: str, speculate: Speculate
) -> tuple[list[SearchNode], int]:
    """Children that a beam of `width` continues, best first, while some of `total` siblings are still decoded; and how many
    of them are sure.

    Of `total` paths the best ceil(unfinished / width) survive. Surely among them is who stays among them even if every
    path under way comes before it and none of those ends its solution: one that does takes a slot, and so at most one
    survivor, away, but is itself out of the way. "likely" adds those who keep their share of the places so far.
    """
    alive = [node for node in done if not node.finished]
    keep = ceil((total - len(done) + len(alive)) / width)
    missing = total - len(done)
    count = sure = max(keep - missing, 0)
    if speculate == "likely" and alive:
        count = max(count, keep * len(alive) // (len(alive) + missing), 1)
    try:
        return ranked(alive, aggregate)[:count], min(sure, len(alive))
    except ValueError:  # no score that ranks; the strategy will say so
        return [], 0
