"""The tokenizer inside a GGUF file, as a transformers tokenizer. Needs the `gguf` extra."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def load_gguf_tokenizer(path: str | os.PathLike) -> PreTrainedTokenizerBase:
    """Tokenizer of a .gguf file, chat template included (about 5 s; `save_gguf_tokenizer` makes the next load fast)."""
    from transformers import AutoTokenizer

    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not a file; pass a .gguf file")
    try:
        return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except ImportError as error:
        raise ImportError(
            f"reading {file.name} needs the package gguf; pip install 'ttskernels[gguf]'"
        ) from error


def save_gguf_tokenizer(path: str | os.PathLike, folder: str | os.PathLike) -> Path:
    """Write the tokenizer files of a .gguf file to `folder`, unless it already has some; returns the folder."""
    folder = Path(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        load_gguf_tokenizer(path).save_pretrained(folder)
    return folder
