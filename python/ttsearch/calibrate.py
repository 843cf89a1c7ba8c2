"""`ttsearch calibrate`: round a model's int8 weights for the text that it reads, once, for `--weights calibrated`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import err, friendly_errors, out

TOKENS, LONGEST = 8192, 512  # of all texts, and of one


def calibrate(
    source: Annotated[str, typer.Argument(help="Policy or process reward model: checkpoint folder, hub id or .gguf file.")],
    texts: Annotated[
        Path | None, typer.Option(help="JSONL file of texts to read [default: text that the model writes itself].")
    ] = None,
    field: Annotated[
        list[str], typer.Option(help="Of a line; may be given several times.")
    ] = ["problem", "solution"],  # noqa: B006
    base: Annotated[str | None, typer.Option(help="Of an adapter or PQM, the model it was trained on.")] = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32: as it will be loaded.")] = "bf16",
) -> None:
    """Round a model's int8 weights for what they meet; `--weights calibrated` is then faster than int8."""
    from ttskernels.models.calibration import calibrate as run

    from .dtypes import torch_dtype
    from .show import progress_bar

    with friendly_errors():
        ids = None if texts is None else read_ids(texts, field, source, base)
        with progress_bar(err) as progress:
            file = run(source, torch_dtype(dtype), texts=ids, base=base, progress=progress)
    out.print(f"kept as {file}; use it with --weights calibrated", highlight=False, markup=False, soft_wrap=True)


def read_ids(file: Path, fields: list[str], source: str, base: str | None) -> list[list[int]]:
    """Token ids of the first texts of a JSONL file: the fields of a line, one below the other.

    Raises:
        ValueError: a line that is not JSON, or lacks a field.
        OSError: the file cannot be read.
    """
    from .jsonl import read_records
    from .tokenizer import load_tokenizer

    tokenizer, found, left = load_tokenizer(source, base), [], TOKENS
    for number, record in read_records(file):
        if missing := [name for name in fields if name not in record]:
            raise ValueError(f"--field must name fields of {file}, whose line {number} has {', '.join(record)}; got {missing[0]}")
        ids = tokenizer("\n".join(str(record[name]) for name in fields)).input_ids[: min(left, LONGEST)]
        found.append(ids)
        left -= len(ids)
        if not left:
            break
    return found
