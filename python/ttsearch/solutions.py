"""Solutions that come from elsewhere: files of them, how they are cut into steps, and which steps they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .data import parse_record, with_unique_ids
from .jsonl import read_records
from .types import Problem

MANY_FIELDS = ("solutions", "completions", "responses")  # a list of solutions
ONE_FIELDS = ("steps", "solution", "completion", "response")  # one solution
SEPARATOR = "\n\n"

Solution = str | Sequence[str]  # text to be cut into steps, or steps


def load_solutions(path: str | Path, limit: int | None = None) -> tuple[list[Problem], list[list[Solution]]]:
    """Problems and their solutions from a JSONL file.

    A record has `problem` or `question`, and either `solutions` (also `completions`, `responses`: a list of texts or lists of
    steps) or one of `steps` (a list), `solution`, `completion`, `response` (a text).

    Raises:
        ValueError: no such file, or a record without a problem or without solutions, with its line.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"file of solutions {str(path)!r} does not exist; pass a JSONL file")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be >= 1, got {limit}")
    problems, solutions = [], []
    for number, record in read_records(path):
        if limit is not None and len(problems) == limit:
            break
        where = f"{path.name} line {number}"
        solutions.append(_solutions_of(record, where))
        problems.append(parse_record({k: v for k, v in record.items() if k not in ONE_FIELDS}, where))
    if not problems:
        raise ValueError(f"{path} holds no problem")
    return with_unique_ids(problems), solutions


def _solutions_of(record: dict[str, Any], where: str) -> list[Solution]:
    for name in MANY_FIELDS:
        if isinstance(record.get(name), list):
            return record[name]
    for name in ONE_FIELDS:
        if record.get(name):
            return [record[name]]
    raise ValueError(f"{where}: needs one of {', '.join(MANY_FIELDS + ONE_FIELDS)}, got fields {sorted(record)}")


def as_steps(solution: Solution, where: str, separator: str = SEPARATOR) -> list[str]:
    """The steps of a solution: a text is cut at `separator`, pieces without visible text left out.

    Raises:
        ValueError: neither text nor list; no step, or a step without visible text in a list of steps.
    """
    if isinstance(solution, str):
        text = solution.replace("\r\n\r\n", "\n\n") if separator == SEPARATOR else solution
        steps = [piece.strip() for piece in text.split(separator) if piece.strip()]
    elif not isinstance(solution, list | tuple):
        raise ValueError(f"{where} must be a text or a list of steps, got {type(solution).__name__} {solution!r}")
    else:
        steps = list(solution)
        for number, step in enumerate(steps, 1):
            if not isinstance(step, str) or not step.strip():
                raise ValueError(f"{where}: step {number} must be a text with something to read, got {step!r}; remove it")
    if not steps:
        raise ValueError(f"{where} has no step; remove it, or pass its text or a list of steps")
    return steps


@dataclass(eq=False)
class Run:
    """Steps that the same solutions go through, one behind the other, and the runs that go on from there."""

    steps: list[str]
    members: list[int]  # indices of the solutions, ascending
    children: list[Run] = field(default_factory=list)
    computed: int = 0  # tokens read for these steps
    kept: int | None = None  # tokens of the path that stayed in front of them; None: nothing was read


def shared_runs(solutions: Sequence[Sequence[str]]) -> list[Run]:
    """The tree of all steps: every common prefix of steps is there once; runs are as long as no solution ends or leaves."""
    roots: list[Run] = []
    waiting = [(roots, list(range(len(solutions))), 0)]
    while waiting:
        siblings, members, depth = waiting.pop()
        groups: dict[str, list[int]] = {}
        for member in members:
            if len(solutions[member]) > depth:
                groups.setdefault(solutions[member][depth], []).append(member)
        for group in groups.values():
            longest = min((solutions[member] for member in group), key=len)
            end = depth + 1
            while end < len(longest) and all(solutions[member][end] == longest[end] for member in group):
                end += 1
            run = Run(list(longest[depth:end]), group)
            siblings.append(run)
            waiting.append((run.children, group, end))
    return roots
