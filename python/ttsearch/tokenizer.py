"""The tokenizer of a checkpoint: folder, hub id or .gguf file."""

from __future__ import annotations

import json
from pathlib import Path

from .gguf_tokenizer import TOKENIZER_FILES, save_gguf_tokenizer


def load_tokenizer(source: str | Path, base: str | Path | None = None):
    """Tokenizer of `source`; one inside a GGUF file is converted once and kept beside the converted weights.

    A checkpoint without tokenizer files has that of `base`, an adapter that of the base model which its config names.

    Raises:
        ValueError: no tokenizer files, no .gguf to read one from, and no base.
    """
    from transformers import AutoTokenizer

    path = Path(source).expanduser()
    gguf = path if path.suffix.lower() == ".gguf" else next(iter(sorted(path.glob("*.gguf"))), None)
    has_files = path.is_dir() and any((path / name).is_file() for name in TOKENIZER_FILES)
    if gguf is not None and not has_files:
        import torch

        from ttskernels.models.sources import resolve

        folder = resolve(gguf, torch.bfloat16)
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            save_gguf_tokenizer(gguf, folder)
        return AutoTokenizer.from_pretrained(folder)
    adapter = path / "adapter_config.json"
    if adapter.is_file() and not has_files and base is None:
        base = json.loads(adapter.read_text())["base_model_name_or_path"]
    if path.is_dir() and not has_files and base:
        return load_tokenizer(base)
    if path.is_dir() and not has_files:
        raise ValueError(
            f"{path} has no tokenizer files (tokenizer.json, ...); copy them from the original checkpoint, or pass as base the "
            "model that a verifier was trained on"
        )
    try:
        return AutoTokenizer.from_pretrained(str(source))
    except (OSError, ValueError) as error:
        if base is not None and not path.is_dir():
            return load_tokenizer(base)
        raise ValueError(f"cannot load a tokenizer from {source}: {error}") from error
