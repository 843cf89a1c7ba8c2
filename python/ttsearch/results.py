"""Results on disk: one JSON record a line, appended as they come; a stopped run can be continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .budget import Budget
from .jsonl import append_record, cut_partial_line, read_records
from .types import Problem

FIELDS = {"id", "strategy", "budget"}  # of a record


class ResultsFile:
    """Records of one strategy, budget and backend. A last line cut by a crash is removed; its problem runs again.

    `backend` says what the models were, see `solve_many`.
    """

    def __init__(
        self, path: str | Path | None, strategy: str, budget: Budget, backend: dict[str, Any] | None = None
    ):
        self.path = Path(path) if path is not None else None
        self.records: dict[str, dict[str, Any]] = {}
        if self.path is None:
            return
        if self.path.exists():
            cut_partial_line(self.path, FIELDS)
            self.records = {record["id"]: record for record in read_results(self.path)}
        run = {"strategy": strategy, "budget": budget.to_dict(), "backend": backend}
        for record in self.records.values():
            if not record.keys() >= {"prompt", "gold", "backend"}:
                raise ValueError(
                    f"{self.path} does not say which problems and models its results are of, as those of earlier versions; "
                    "choose another results file"
                )
            self._require("results", record, run)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def finished(self, problem: Problem) -> dict[str, Any] | None:
        """The record of a problem that need not run again: there is one, and without an error.

        Raises:
            ValueError: it is of another problem with this id, or was graded by another answer.
        """
        record = self.records.get(problem.id)
        if record is None:
            return None
        self._require(f"problem {problem.id!r}", record, {"prompt": problem.prompt, "gold": problem.answer})
        return None if "error" in record else record

    def append(self, record: dict[str, Any]) -> None:
        self.records[record["id"]] = record
        if self.path is not None:
            append_record(self.path, record)

    def _require(self, what: str, record: dict[str, Any], now: dict[str, Any]) -> None:
        found = differences({name: record[name] for name in now}, now)
        if found:
            raise ValueError(
                f"{self.path} holds {what} with {', '.join(found)}; choose another results file, "
                "or continue it with what it was written with"
            )


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """The last record of every problem in a results file."""
    path, records = Path(path), {}
    if not path.exists():
        raise ValueError(f"results file {path} does not exist")
    for number, record in read_records(path):
        if not record.keys() >= FIELDS:
            raise ValueError(f"{path} line {number}: no result record; it must have id, strategy and budget")
        records[record["id"]] = record
    return list(records.values())


def differences(found: Any, now: Any, name: str = "") -> list[str]:
    """What is not the same, field by field."""
    if isinstance(found, dict) and isinstance(now, dict):
        return [each for key in found | now for each in differences(found.get(key), now.get(key), key)]
    return [] if found == now else [f"{name}={found!r:.200} (now {now!r:.200})"]
