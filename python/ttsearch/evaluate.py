"""Run strategies over a problem file: the numbers of a results table, resumable at any point."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .budget import Budget
from .protocols import Backend
from .report import Summary, summarise
from .run import check
from .solve import solve_many
from .types import Problem


def evaluate(
    problems: Sequence[Problem],
    backend: Backend,
    strategy: str,
    budget: Budget,
    *,
    results: str | Path | None = None,
    concurrency: int = 8,
    progress: Callable[[int, int, dict[str, Any]], None] | None = None,
) -> tuple[Summary | None, list[dict[str, Any]]]:
    """Accuracy and mean cost of one strategy. After Ctrl-C the summary covers the finished problems (None:
    there are none).

    Raises:
        ValueError: a problem without an answer to grade by.
    """
    missing = [problem.id for problem in problems if problem.answer is None]
    if missing:
        raise ValueError(
            f"evaluate needs an answer for every problem; {len(missing)} have none, "
            f"the first is {missing[0]!r}"
        )
    records = solve_many(
        problems, backend, strategy, budget, concurrency=concurrency, results=results, progress=progress
    )
    return (summarise(records) if records else None), records


def runs(strategies: Iterable[str], ns: Sequence[int]) -> list[tuple[str, int]]:
    """Every strategy at every N, greedy once."""
    return [(strategy, n) for strategy in strategies for n in (ns[:1] if strategy == "greedy" else ns)]


def sweep(
    problems: Sequence[Problem],
    backend: Backend,
    strategies: Iterable[str],
    budget: Budget,
    ns: Iterable[int],
    folder: str | Path,
    *,
    concurrency: int = 8,
    progress: Callable[[str, int, int, int], None] | None = None,
) -> list[Summary]:
    """Every one of `runs`, a results file each in `folder`. Run again to continue.

    Returns:
        A summary of every run; after Ctrl-C of those that have a finished problem.
    Raises:
        ValueError: a strategy or an N that cannot be used, before anything has run.
    """
    planned = runs(strategies, list(ns))
    for strategy, n in planned:
        check(backend, strategy, replace(budget, n=n))
    summaries = []
    for strategy, n in planned:
        name = f"{strategy}.jsonl" if strategy == "greedy" else f"{strategy}-n{n}.jsonl"

        def report(done: int, total: int, _: dict, strategy: str = strategy, n: int = n) -> None:
            if progress:
                progress(strategy, n, done, total)

        summary, records = evaluate(
            problems, backend, strategy, replace(budget, n=n), results=Path(folder) / name,
            concurrency=concurrency, progress=report,
        )  # fmt: skip
        if summary:
            summaries.append(summary)
        if len(records) < len(problems):
            break  # interrupted
    return summaries
