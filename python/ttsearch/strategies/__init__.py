"""Every strategy by name. A strategy is a coroutine `(problem, policy, budget) -> SearchResult`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from ..budget import Budget
from ..protocols import Policy
from ..types import Problem, SearchResult
from .beam_search import beam_search
from .best_of_n import best_of_n
from .dvts import dvts
from .greedy import greedy
from .majority import majority


@dataclass(frozen=True)
class Strategy:
    name: str
    run: Callable[[Problem, Policy, Budget], Awaitable[SearchResult]]
    description: str
    source: str
    needs_verifier: bool = True
    splits_budget: bool = False  # N is cut into N / M: N must be a multiple of M
    fixed: tuple[tuple[str, int | float], ...] = ()  # budget fields the strategy is defined by

    def prepare(self, budget: Budget) -> Budget:
        """The budget to open the session with; raises ValueError if the strategy cannot use it."""
        budget = replace(budget, **dict(self.fixed))
        if self.splits_budget:
            _ = budget.survivors
        if self.needs_verifier:
            budget.require(self.name, "aggregate", "vote")
        return budget


_ALL = (
    Strategy(
        "greedy", greedy, "one path, always the likeliest token", "baseline (CoT)",
        needs_verifier=False, fixed=(("n", 1), ("width", 1), ("temperature", 0.0)),
    ),
    Strategy(
        "majority", majority, "N samples, the most frequent answer", "Wang et al. 2022, arXiv:2203.11171",
        needs_verifier=False,
    ),
    Strategy(
        "best_of_n", best_of_n, "N samples, the verifier chooses", "Lightman et al. 2023, arXiv:2305.20050",
    ),
    Strategy(
        "beam_search", beam_search, "N paths, the best N/M survive each step and branch M ways",
        "Snell et al. 2024, arXiv:2408.03314", splits_budget=True,
    ),
    Strategy(
        "dvts", dvts, "N/M independent greedy beams of width M", "Beeching et al. 2024, Hugging Face blog",
        splits_budget=True,
    ),
)  # fmt: skip
STRATEGIES: dict[str, Strategy] = {strategy.name: strategy for strategy in _ALL}


def get_strategy(name: str) -> Strategy:
    if name not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {name!r}")
    return STRATEGIES[name]
