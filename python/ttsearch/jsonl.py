"""Files of one JSON object a line that grow while a run goes on, and survive its being killed in the middle of a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

BEGINNING = b'{"id": '  # of every record that we write


def cut_partial_line(path: Path, fields: Set[str]) -> None:
    """Remove a last line without an end: whoever wrote it was stopped. A whole record gets its end.

    Raises:
        ValueError: the file holds something else than records with `fields`; it is left as it is.
    """
    *lines, last = path.read_bytes().split(b"\n")
    if not last:
        return
    ours = all(_is_record(line, fields) for line in lines if line.strip())
    if ours and _is_record(last, fields):
        with path.open("ab") as file:
            file.write(b"\n")
    elif ours and BEGINNING.startswith(last[: len(BEGINNING)]) and _parsed(last) is None:
        with path.open("r+b") as file:
            file.truncate(sum(len(line) + 1 for line in lines))
    else:
        raise ValueError(f"{path} must hold our own records, with {', '.join(sorted(fields))}; choose another results file")


def _is_record(line: bytes, fields: Set[str]) -> bool:
    record = _parsed(line)
    return isinstance(record, dict) and fields <= record.keys()


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:  # no JSON, or cut within a character
        return None


def append_record(path: Path, record: dict[str, Any]) -> None:
    """One more line, in one write. What is no UTF-8 (a lone surrogate) is written as JSON's \\uXXXX."""
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
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
