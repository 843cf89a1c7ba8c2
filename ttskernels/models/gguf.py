"""GGUF files: dequantised once through transformers and kept as safetensors in a cache folder."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from ttskernels._cache import cache_root
from ttskernels.models.families import family_of


def converted_folder(path: Path, dtype: torch.dtype) -> Path:
    """Folder with config.json and model.safetensors of a GGUF file; converts it if the cache has no current copy.

    The copy's name holds size, modification time and a hash of the path, so a replaced file is converted again.

    Raises:
        ValueError: not a complete GGUF file, or an architecture or feature that is not supported.
        ImportError: the `gguf` extra is not installed.
    """
    path = path.resolve()
    stat = path.stat()
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:12]
    name = f"{path.stem}-{digest}-{stat.st_size}-{stat.st_mtime_ns}-{str(dtype).removeprefix('torch.')}"
    target = cache_root() / "gguf" / name
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{path.stem}-", dir=target.parent))
    try:
        convert(path, dtype, fresh)
        if not target.exists():  # another process may have finished first
            fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return target


def check_file(path: Path) -> None:
    """Read the header: architecture known, every tensor inside the file, no rotary scaling that would get lost."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith("tokenizer.")
        }
        tensors = [tensor.name for tensor in reader.tensors]
    except Exception as error:  # the reader indexes into whatever bytes there are: any error means a bad file
        raise ValueError(f"{path} is not a complete GGUF file ({error}); download it again") from error
    architecture = fields.get("general.architecture")
    family_of(architecture)
    scaling = fields.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in tensors:
        raise ValueError(
            f"{path} scales its rotary frequencies ({'rope_freqs.weight' if scaling == 'none' else scaling}), "
            "which the GGUF reader of transformers drops; use the safetensors checkpoint"
        )


def _require_extra(path: Path) -> None:
    for module in ("gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise ImportError(
                f"reading {path.name} needs the package {module}; pip install 'ttskernels[gguf]'"
            )


def convert(path: Path, dtype: torch.dtype, folder: Path) -> None:
    """Write config.json and model.safetensors of a GGUF file to an existing folder."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    _require_extra(path)
    check_file(path)
    model, info = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype, output_loading_info=True
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        lacking = sorted(map(str, info["missing_keys"] or info["mismatched_keys"]))
        raise ValueError(
            f"{path} lacks {', '.join(lacking[:3])} in the expected shape; it is damaged or of another model"
        )
    tied = model.config.tie_word_embeddings
    weights = {
        name: tensor.detach().contiguous()
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    entries: dict[str, Any] = model.config.to_dict()
    entries |= {"architectures": [type(model).__name__], "dtype": str(dtype).removeprefix("torch.")}
    for transient in ("quantization_config", "_name_or_path"):
        entries.pop(transient, None)
    (folder / "config.json").write_text(json.dumps(entries, indent=2, default=str) + "\n")
