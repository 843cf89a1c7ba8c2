"""Results on disk: one JSON record a line, appended as they come; a stopped run can be continued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .budget import Budget
from .jsonl import append_record, cut_partial_line


class ResultsFile:
    """Records of one strategy and budget. A last line cut by a crash is removed; its problem runs again."""

    def __init__(self, path: str | Path | None, strategy: str, budget: Budget):
        self.path = Path(path) if path is not None else None
        self.records: dict[str, dict[str, Any]] = {}
        if self.path is None:
            return
        if self.path.exists():
            cut_partial_line(self.path)
            self.records = {record["id"]: record for record in read_results(self.path)}
        for record in self.records.values():
            if (record["strategy"], record["budget"]) != (strategy, budget.to_dict()):
                raise ValueError(
                    f"{self.path} holds results of {record['strategy']} with "
                    f"{_difference(record['budget'], budget)}; "
                    "choose another file, or the same strategy and budget to continue it"
                )
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, record: dict[str, Any]) -> None:
        self.records[record["id"]] = record
        if self.path is not None:
            append_record(self.path, record)


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """Every complete record of a results file."""
    path, records = Path(path), []
    if not path.exists():
        raise ValueError(f"results file {path} does not exist")
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            raise ValueError(f"{path} line {number}: not JSON; it is not a results file") from None
        if not isinstance(record, dict) or not {"id", "strategy", "budget"} <= record.keys():
            raise ValueError(f"{path} line {number}: no result record; it must have id, strategy and budget")
        records.append(record)
    return records


def _difference(found: dict[str, Any], budget: Budget) -> str:
    now = budget.to_dict()
    names = [name for name in now if found.get(name) != now[name]]
    return (
        ", ".join(f"{name}={found.get(name)!r} (now {now[name]!r})" for name in names) or "another strategy"
    )
