"""Problem sets: JSONL files in the shapes of GSM8K, MATH-500, AIME and AMC, or a dataset on the hub."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .answers import extract_answer, extract_boxed
from .grade import gold_answer
from .jsonl import read_records
from .types import Problem

PROMPT_FIELDS = ("problem", "question", "prompt")
ANSWER_FIELDS = ("answer", "extracted_groundtruth", "solution")
ID_FIELDS = ("id", "unique_id", "url")


def load_problems(source: str | Path, limit: int | None = None, split: str = "test") -> list[Problem]:
    """Problems of a JSONL file, or of a dataset on the hub ("HuggingFaceH4/MATH-500"; needs `pip install
    datasets`).

    A record needs `problem` or `question`; its answer is read from `answer` (GSM8K's `#### 42` too), else
    from `extracted_groundtruth`, else from a boxed `solution`; empty ones are passed over. A missing or repeated id is
    replaced by a hash of the prompt.

    Raises:
        ValueError: no such file or dataset, or a record without a question or with a list of answers, with its line.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be >= 1, got {limit}")
    path = Path(source)
    if path.exists():
        records = _read_jsonl(path)
    elif path.suffix in (".jsonl", ".json") or "/" not in str(source):
        raise ValueError(
            f"problem file {str(source)!r} does not exist; pass a JSONL file or a hub dataset like owner/name"
        )
    else:
        records = _read_hub(str(source), split)
    problems: list[Problem] = []
    for record, where in records:
        if limit is not None and len(problems) == limit:
            break
        problems.append(parse_record(record, where))
    if not problems:
        raise ValueError(f"{source} holds no problem")
    return with_unique_ids(problems)


def parse_record(record: dict[str, Any], where: str = "record") -> Problem:
    prompt = next((record[f] for f in PROMPT_FIELDS if record.get(f)), None)
    if not isinstance(prompt, str):
        raise ValueError(
            f"{where}: needs a text field {' or '.join(PROMPT_FIELDS)}, got fields {sorted(record)}"
        )
    identity = next((str(record[f]) for f in ID_FIELDS if record.get(f)), "")
    try:
        return Problem(prompt, _gold(record), identity, record.get("level"))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _gold(record: dict[str, Any]) -> str | None:
    for name in ANSWER_FIELDS:
        value = record.get(name)
        if value is None or value == "":
            continue
        if not isinstance(value, str | int | float):
            raise ValueError(f"{name} must be a text or a number, got {value!r}; write several answers as one text")
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if name == "solution" and isinstance(value, str):  # prose: its last number need not be the answer
            value = extract_answer(value) if extract_boxed(value) or "####" in value else None
        if value is not None:
            return gold_answer(str(value))
    return None


def with_unique_ids(problems: list[Problem]) -> list[Problem]:
    """Ids seed the sampling and name results, so they may not repeat; a repeated one gets a suffix."""
    seen: set[str] = set()
    unique = []
    for problem in problems:
        identity = problem.id
        if identity in seen:
            base = identity = Problem(problem.prompt).id
            copy = 2
            while identity in seen:
                identity, copy = f"{base}-{copy}", copy + 1
            problem = Problem(problem.prompt, problem.answer, identity, problem.level)
        seen.add(identity)
        unique.append(problem)
    return unique


def _read_jsonl(path: Path) -> Iterable[tuple[dict, str]]:
    try:
        for number, record in read_records(path):
            yield record, f"{path.name} line {number}"
    except UnicodeDecodeError as error:
        raise ValueError(f"problem file {str(path)!r} must be UTF-8, it is not ({error}); convert it") from None


def _read_hub(name: str, split: str) -> Iterable[tuple[dict, str]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"{name!r} is no file; to read it from the hub, `pip install datasets`") from None
    for number, record in enumerate(load_dataset(name, split=split)):
        yield dict(record), f"{name} record {number}"
