"""Files of one JSON object a line that grow while a run goes on, and survive its being killed in the middle of a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def cut_partial_line(path: Path) -> None:
    """Remove a last line without an end: whoever wrote it was stopped."""
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def append_record(path: Path, record: dict[str, Any]) -> None:
    """One more line, in one write."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not blank.

    Raises:
        ValueError: a line that is not a JSON object, with its number.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path.name} line {number}: not JSON ({error}); the file must hold one JSON object a line"
                ) from None
            if not isinstance(record, dict):
                raise ValueError(f"{path.name} line {number}: must be a JSON object, got {type(record).__name__}")
            yield number, record
