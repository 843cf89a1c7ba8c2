"""The score of a path while it grows: min, last, mean and product, folded step by step and shared by forks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ttskernels.ops.path_aggregate import aggregate, empty_state, path_aggregate

from ..types import PathScores


@dataclass(frozen=True, eq=False)
class Running:
    """State of one path; never changed, so the children of a fork all fold into their parent's."""

    state: Tensor = field(default_factory=lambda: empty_state(1))  # [1, 5], of op path_aggregate
    bounded: bool = True  # every score so far is in [0, 1], as products need

    def fold(self, scores: Sequence[float | None]) -> Running:
        """The state with the scores of new steps behind it; a step without a score (None) is passed over."""
        new = [score for score in scores if score is not None]
        if not new:
            return self
        bounded = self.bounded and all(0 <= score <= 1 for score in new)
        indptr = torch.tensor([0, len(new)], dtype=torch.int32)
        return Running(path_aggregate(self.state, torch.tensor(new, dtype=torch.float32), indptr), bounded)

    def scores(self) -> PathScores:
        """What the path scores by each rule; NaN where it has no scored step."""
        least, last, mean, product = (float(aggregate(self.state, how)) for how in ("min", "last", "mean", "product"))
        count, log_product = int(self.state[0, 0]), float(self.state[0, 4])
        return PathScores(count, least, last, mean, product, log_product, self.bounded)
