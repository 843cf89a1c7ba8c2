"""One search as a coroutine: open a session, run the strategy, close the session, whatever happens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from .budget import Budget
from .protocols import Backend, Policy
from .record import conclude
from .strategies import Strategy, get_strategy
from .tree import kept_leaves
from .types import Problem, SearchResult

TICK_SECONDS = 0.2


@dataclass(frozen=True)
class Progress:
    """Where a running search stands."""

    problem: Problem
    seconds: float
    step: int  # of the deepest path
    alive: int  # paths still growing
    finished: int
    tokens_decoded: int


def check(backend: Backend, strategy: str, budget: Budget) -> tuple[Strategy, Budget]:
    """The strategy and the budget it will really use; whatever it cannot run with is raised here."""
    chosen = get_strategy(strategy)
    budget = chosen.prepare(budget)
    if chosen.needs_verifier and not backend.has_verifier:
        raise ValueError(
            f'strategy {strategy!r} needs a verifier; pass verifier=..., or use "majority" or "greedy"'
        )
    return chosen, budget


async def search(
    problem: Problem,
    backend: Backend,
    strategy: str,
    budget: Budget,
    *,
    progress: Callable[[Progress], None] | None = None,
    keep_partial: bool = False,
) -> SearchResult:
    """Solve one problem. With `keep_partial` a cancellation ends the search and returns what is in hand
    (`interrupted=True`); without, it is raised as usual. Either way every KV page goes back.
    """
    chosen, budget = check(backend, strategy, budget)
    start = time.perf_counter()
    policy = backend.open(problem, budget)
    ticker = asyncio.ensure_future(_tick(problem, policy, start, progress)) if progress else None
    try:
        try:
            result = await chosen.run(problem, policy, budget)
        except asyncio.CancelledError:
            if not keep_partial:
                raise
            result = _partial(problem, policy, chosen, budget)
        result.cost = policy.cost()
    finally:
        try:
            if ticker:
                ticker.cancel()
                with suppress(asyncio.CancelledError):
                    await ticker  # raises what `progress` raised
        finally:
            policy.close()
    if progress:
        progress(measure(problem, policy, start))
    result.seconds = time.perf_counter() - start
    return result


def _partial(problem: Problem, policy: Policy, strategy: Strategy, budget: Budget) -> SearchResult:
    leaves = kept_leaves(policy.root)
    scored = strategy.needs_verifier
    aggregate, vote = (budget.aggregate, budget.vote) if scored else (None, "majority")
    result = conclude(problem, policy, budget, leaves, strategy=strategy.name, aggregate=aggregate, vote=vote)
    result.interrupted = True
    return result


def measure(problem: Problem, policy: Policy, start: float) -> Progress:
    leaves = kept_leaves(policy.root)
    finished = sum(leaf.finished for leaf in leaves)
    step = max((len(leaf.path_key) for leaf in leaves), default=0)
    seconds = time.perf_counter() - start
    return Progress(
        problem, seconds, step, len(leaves) - finished, finished, policy.cost().policy.tokens_decoded
    )


async def _tick(problem: Problem, policy: Policy, start: float, progress: Callable[[Progress], None]) -> None:
    while True:
        progress(measure(problem, policy, start))
        await asyncio.sleep(TICK_SECONDS)
