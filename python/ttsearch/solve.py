"""The synchronous entries: solve one problem, or many at once with results written as they come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .backend import load_backend
from .budget import Budget
from .grade import is_correct
from .loop import run_sync
from .protocols import Backend
from .results import ResultsFile
from .run import Progress, check, search
from .types import Problem, SearchResult


def solve(
    problem: Problem | str,
    policy: str | Path | None = None,
    verifier: str | Path | None = None,
    strategy: str = "beam_search",
    n: int = 16,
    *,
    width: int = 4,
    aggregate: str = "product",
    vote: str = "weighted",
    backend: Backend | None = None,
    backend_options: dict[str, Any] | None = None,
    progress: Callable[[Progress], None] | None = None,
    **budget: Any,
) -> SearchResult:
    """Search for the answer of one problem. Works inside a running event loop too (Jupyter).

    Args:
        problem: a `Problem`, or its text.
        policy, verifier: checkpoint folders or hub ids; left out, the demo models. Ignored if `backend` is
            given.
        strategy: a name of `ttsearch.strategies.STRATEGIES`.
        n, width, aggregate, vote, budget: see `Budget`.
        backend: models already loaded; the caller keeps it open. `backend_options` go to `load_backend`.
        progress: called a few times a second, and at the end.
    Returns:
        The result; after Ctrl-C what is finished so far, with `interrupted=True`.
    Raises:
        ValueError: an argument is out of range, or the strategy needs a verifier and there is none.
    """
    problem = Problem(problem) if isinstance(problem, str) else problem
    budget = Budget(n, width, aggregate=aggregate, vote=vote, **budget)
    own = backend is None
    backend = backend or load_backend(policy, verifier, **(backend_options or {}))
    try:
        return run_sync(search(problem, backend, strategy, budget, progress=progress, keep_partial=True))
    finally:
        if own:
            backend.close()


def solve_many(
    problems: Iterable[Problem],
    backend: Backend,
    strategy: str,
    budget: Budget,
    *,
    concurrency: int = 8,
    results: str | Path | None = None,
    progress: Callable[[int, int, dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Solve problems concurrently and grade those that have an answer.

    Args:
        backend: what its `settings` say of its models, if it has any, is kept with every record; a dict, JSON-ready.
        results: JSONL file that every record is appended to as soon as it is there. Problems already in it
            are not run again, except after an error; it must come from the same problems, strategy, budget and backend.
        progress: called with (done, total, record) after each problem.
    Returns:
        The records (`SearchResult.to_dict()`, `correct` and `backend`), in the order of `problems`. A problem the
        backend refuses has an `error` and no answer. After Ctrl-C: the finished ones alone.
    Raises:
        ValueError: an argument is out of range, or `results` hold something else; what differs is said.
    """
    problems = list(problems)
    if concurrency < 1:
        raise ValueError(f"concurrency must be >= 1, got {concurrency}")
    if len({problem.id for problem in problems}) < len(problems):
        raise ValueError("problems must have distinct ids; they name results and seed the sampling")
    _, prepared = check(backend, strategy, budget)
    settings = getattr(backend, "settings", None)
    file = ResultsFile(results, strategy, prepared, settings)
    done = {problem.id: record for problem in problems if (record := file.finished(problem)) is not None}
    todo = [problem for problem in problems if problem.id not in done]

    async def one(problem: Problem, slots: asyncio.Semaphore) -> None:
        from ttskernels.errors import OutOfPagesError  # here: `import ttsearch` loads no torch

        async with slots:
            try:
                record = (await search(problem, backend, strategy, budget)).to_dict()
            except (ValueError, OutOfPagesError) as error:  # this problem cannot be solved here; the others can
                record = error_record(problem, strategy, prepared, error)
            if problem.answer is not None:
                record["correct"] = await asyncio.to_thread(is_correct, record["answer"], problem.answer)
            record["backend"] = settings
            file.append(record)
            done[problem.id] = record
            if progress:
                progress(len(done), len(problems), record)

    async def everything() -> None:
        slots = asyncio.Semaphore(concurrency)
        tasks = [asyncio.ensure_future(one(problem, slots)) for problem in todo]
        try:
            await asyncio.gather(*tasks)
        except asyncio.CancelledError:
            pass  # Ctrl-C: what is written is written
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    if todo:
        run_sync(everything())
    return [done[problem.id] for problem in problems if problem.id in done]


def error_record(problem: Problem, strategy: str, budget: Budget, error: Exception) -> dict[str, Any]:
    """Of a problem that the backend refuses."""
    return {
        "id": problem.id, "prompt": problem.prompt, "gold": problem.answer, "level": problem.level,
        "strategy": strategy, "answer": None, "error": str(error), "budget": budget.to_dict(),
        "candidates": [], "num_voted": 0,
    }  # fmt: skip
