"""Score solutions that come from elsewhere: every common prefix of steps once, results written as they come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .backend import load_verifier
from .data import with_unique_ids
from .jsonl import append_record, cut_partial_line, read_records
from .loop import run_sync
from .protocols import Verifier, VerifierSession
from .solutions import SEPARATOR, Run, Solution, as_steps, shared_runs
from .tree import together
from .types import PathScores, Problem

Progress = Callable[[int, int], None]
FIELDS = {"id", "problem", "verifier", "solutions"}  # of a record


@dataclass
class SolutionScores:
    """What a verifier says of one solution.

    `scores` has one number a step; None where the verifier could not take the path any more (`refused` says why) or
    failed (`error`). `min`, `last`, `mean` and `product` are over all steps, None for an incomplete solution; `product`
    also for scores outside [0, 1]. `tokens_reused` of its prefix were computed for an earlier solution of the problem,
    `tokens_computed` for this one.
    """

    steps: list[str]
    scores: list[float | None] = field(default_factory=list)
    min: float | None = None
    last: float | None = None
    mean: float | None = None
    product: float | None = None
    tokens_computed: int = 0
    tokens_reused: int = 0
    refused: str | None = None
    error: str | None = None

    def finish(self, running: PathScores | None) -> None:
        """The path is complete: fill in what is over all steps."""
        if running is not None and running.count and None not in self.scores:
            self.min, self.last, self.mean = running.min, running.last, running.mean
            self.product = running.product if running.bounded else None


def score_steps(
    problems: Sequence[Problem | str],
    solutions: Sequence[Sequence[Solution]],
    verifier: Verifier | str | Path,
    *,
    family: Any = None,
    separator: str = SEPARATOR,
    results: str | Path | None = None,
    concurrency: int = 4,
    progress: Progress | None = None,
    **options: Any,
) -> list[list[SolutionScores]]:
    """Score the steps of solutions that are there already: own search, own data.

    Solutions of a problem share every common prefix of steps, which is computed once; the same problem given several
    times counts as one. Works inside a running event loop too (Jupyter).

    Args:
        problems: texts, or `Problem`s.
        solutions: of each problem, a list of solutions; a solution is a list of steps, or a text that is cut at `separator`.
        verifier: checkpoint folder or hub id; or a `Verifier` already loaded, which the caller keeps open.
        family, options: for `load_verifier`, where `verifier` is to be loaded (`dtype`, `kv_bytes`, ...).
        results: JSONL file that a record for each problem is appended to as soon as it is there. Run again to continue, with
            the same verifier, family and dtype; problems with an error are tried again.
        concurrency: problems scored at the same time.
        progress: called with (solutions done, all solutions).
    Returns:
        For each problem, in order, a `SolutionScores` for each solution. A path that is too long or a score that is not
        finite spoils the solutions that go through it, not the others.
    Raises:
        ValueError: lists of different lengths, a solution without a step, an empty step; results of other solutions or of
            another verifier; options for a verifier that is loaded already.
        KeyboardInterrupt: after Ctrl-C; what is in `results` is kept.
    """
    if isinstance(problems, str | Problem) or len(problems) != len(solutions):
        raise ValueError("problems and solutions must be lists of one length, with a list of solutions for each problem")
    if concurrency < 1:
        raise ValueError(f"concurrency must be >= 1, got {concurrency}")
    problems = with_unique_ids([p if isinstance(p, Problem) else Problem(p) for p in problems])
    for i, each in enumerate(solutions):
        if isinstance(each, str):
            raise ValueError(f"solutions[{i}] must be a list of solutions, got a text; pass [text]")
    steps = [
        [as_steps(s, f"solutions[{i}][{j}]", separator) for j, s in enumerate(each)]
        for i, each in enumerate(solutions)
    ]
    verifier, own = own_verifier(verifier, family=family, **options)
    try:
        return run_sync(_Job(problems, steps, verifier, results, progress).run(concurrency))
    finally:
        if own:
            verifier.close()


def own_verifier(verifier: Verifier | str | Path, **options: Any) -> tuple[Verifier, bool]:
    """A verifier, and whether it was loaded here, so that it is to be closed here.

    Raises:
        ValueError: options for one that is loaded already.
    """
    if isinstance(verifier, str | Path):
        return load_verifier(verifier, **options), True
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(
            f"{', '.join(given)}: no such argument, or one for loading a verifier, and {verifier.name} is loaded already; "
            "leave it out, or pass the verifier's path"
        )
    return verifier, False


def summarise(scored: Sequence[Sequence[SolutionScores]]) -> dict[str, int | float]:
    """Counts over everything that was scored, and the mean step score (0 without any)."""
    each = [solution for group in scored for solution in group]
    scores = [score for solution in each for score in solution.scores if score is not None]
    return {
        "problems": len(scored), "solutions": len(each), "steps": len(scores),
        "mean_score": sum(scores) / len(scores) if scores else 0.0,
        "tokens_computed": sum(solution.tokens_computed for solution in each),
        "tokens_reused": sum(solution.tokens_reused for solution in each),
        "refused": sum(solution.refused is not None for solution in each),
        "errors": sum(solution.error is not None for solution in each),
    }  # fmt: skip


class _Job:
    """One call of `score_steps`."""

    def __init__(
        self,
        problems: list[Problem],
        steps: list[list[list[str]]],
        verifier: Verifier,
        results: str | Path | None,
        progress: Progress | None,
    ):
        self.problems, self.steps, self.verifier, self.progress = problems, steps, verifier, progress
        self.file = Path(results) if results is not None else None
        self.scored: dict[int, list[SolutionScores]] = {}
        if self.file is not None:
            self._resume(self.file)
        self.total = sum(map(len, steps))
        self.done = sum(len(self.steps[i]) for i in self.scored)

    def _resume(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            return
        cut_partial_line(file, FIELDS)
        index = {problem.id: i for i, problem in enumerate(self.problems)}
        for number, record in read_records(file):
            where = f"{file} line {number}"
            if not record.keys() >= FIELDS:
                raise ValueError(f"{where}: no record of score_steps; choose another results file")
            if record["verifier"] != self.verifier.name:
                raise ValueError(
                    f"{where} was scored by {record['verifier']}, now it is {self.verifier.name} (the code is of its folder, "
                    "family, dtype and the like); choose another results file"
                )
            i = index.get(record["id"])
            if i is None:
                continue  # of another part of the data
            if record["problem"] != self.problems[i].prompt or [s["steps"] for s in record["solutions"]] != self.steps[i]:
                raise ValueError(f"{where} holds other solutions of problem {record['id']}; choose another results file")
            if not any(s["error"] for s in record["solutions"]):  # else it is tried again, and the later line counts
                self.scored[i] = [SolutionScores(**s) for s in record["solutions"]]

    async def run(self, concurrency: int) -> list[list[SolutionScores]]:
        slots = asyncio.Semaphore(concurrency)
        groups: dict[str, list[int]] = {}
        for i, problem in enumerate(self.problems):
            if i not in self.scored:
                groups.setdefault(problem.prompt, []).append(i)

        async def one(prompt: str, members: list[int]) -> None:
            async with slots:
                await self._group(prompt, members)

        self._tell(0)
        await together(one(prompt, members) for prompt, members in groups.items())
        return [self.scored[i] for i in range(len(self.problems))]

    async def _group(self, prompt: str, members: list[int]) -> None:
        """All entries of one problem text, in one session."""
        scores = [SolutionScores(steps) for i in members for steps in self.steps[i]]
        try:
            session = self.verifier.open(prompt)
        except ValueError as error:  # this problem cannot be scored; the others can
            for each in scores:
                each.scores, each.error = [None] * len(each.steps), str(error)
            self._tell(len(scores))
        else:
            try:
                await _Scorer(session, scores, self._tell).run()
            finally:
                session.close()
        at = 0
        for i in members:
            own = scores[at : at + len(self.steps[i])]
            at += len(own)
            self.scored[i] = own
            if self.file is not None:
                problem = self.problems[i]
                append_record(self.file, {
                    "id": problem.id, "problem": problem.prompt, "verifier": self.verifier.name,
                    "solutions": [asdict(each) for each in own],
                })  # fmt: skip

    def _tell(self, more: int) -> None:
        self.done += more
        if self.progress:
            self.progress(self.done, self.total)


class _Scorer:
    """The solutions of one problem, in one session of a verifier."""

    def __init__(self, session: VerifierSession, solutions: list[SolutionScores], done: Callable[[int], None]):
        self.session, self.solutions, self.done = session, solutions, done

    async def run(self) -> None:
        runs = shared_runs([solution.steps for solution in self.solutions])
        await together(self._grow(self.session.root, run) for run in runs)
        self._count_tokens(runs)

    async def _grow(self, parent: Any, run: Run) -> None:
        """Score a run of steps behind a chain, and then, at once, all that goes on from it."""
        from ttskernels.errors import OutOfPagesError  # here: `import ttsearch` loads no torch

        try:
            handle, refused, running = await self._score(parent, run.steps, run)
        except (ValueError, OutOfPagesError) as error:
            self._stop(run, error=str(error))
            return
        if refused:
            self._stop(run, refused=refused)
        else:
            members = [self.solutions[i] for i in run.members]
            ended = [solution for solution in members if len(solution.scores) == len(solution.steps)]
            for solution in ended:
                solution.finish(running)
            self.done(len(ended))
            await together(self._grow(handle, child) for child in run.children)
        if handle is not parent:
            self.session.release([handle])

    async def _score(self, parent: Any, steps: list[str], run: Run) -> tuple[Any, str | None, PathScores | None]:
        """The handle behind as many of the steps as the verifier takes, why it takes no more, and the path's scores."""
        scored = await self.session.score(parent, steps)
        if scored.refused:
            return await self._score_some(parent, steps, run) if len(steps) > 1 else (parent, scored.refused, None)
        for i in run.members:
            self.solutions[i].scores += scored.scores
            self.solutions[i].error = self.solutions[i].error or scored.failed
        run.computed += scored.computed
        run.kept = scored.kept if run.kept is None else run.kept
        return scored.handle, None, scored.running

    async def _score_some(self, parent: Any, steps: list[str], run: Run) -> tuple[Any, str | None, PathScores | None]:
        """All steps together are too long: some of them may still fit."""
        half = len(steps) // 2
        handle, refused, running = await self._score(parent, steps[:half], run)
        if refused:
            return handle, refused, running
        try:
            further, refused, running = await self._score(handle, steps[half:], run)
        except BaseException:
            self.session.release([handle])
            raise
        if further is not handle:
            self.session.release([handle])
        return further, refused, running

    def _stop(self, run: Run, refused: str | None = None, error: str | None = None) -> None:
        for i in run.members:
            solution = self.solutions[i]
            solution.scores += [None] * (len(solution.steps) - len(solution.scores))
            solution.refused, solution.error = refused, error
        self.done(len(run.members))

    def _count_tokens(self, runs: list[Run]) -> None:
        """Tokens belong to the first solution that needs them; the others find them there."""
        paths: dict[int, list[Run]] = {i: [] for i in range(len(self.solutions))}
        waiting = runs[::-1]
        while waiting:
            run = waiting.pop()
            waiting += run.children[::-1]
            if run.kept is not None:
                for i in run.members:
                    paths[i].append(run)
        opened = False
        for i, path in paths.items():
            own, solution = [run for run in path if run.members[0] == i], self.solutions[i]
            solution.tokens_computed = sum(run.computed for run in own)
            if own:
                solution.tokens_reused = own[0].kept
            elif path:
                solution.tokens_reused = path[-1].kept + path[-1].computed
            if own and not opened:  # the problem itself
                solution.tokens_computed, solution.tokens_reused, opened = solution.tokens_computed + own[0].kept, 0, True
