"""GGUF files: dequantised once through transformers and kept as safetensors in a cache folder."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch

from ttskernels._cache import cache_root
from ttskernels.models.families import family_of
from ttskernels.models.weights import some

FILES = ("model.safetensors", "config.json")
UNUSED = r"blk\.\d+\.attn_rot_embd\b.*"  # old files stored it; it follows from the header


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
    if all((target / name).is_file() for name in FILES):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=target.parent) as fresh:
        convert(path, dtype, Path(fresh))
        target.mkdir(exist_ok=True)
        for name in FILES:  # over those of another process, which are the same
            (Path(fresh) / name).replace(target / name)
    return target


def check_file(path: Path) -> list[str]:
    """Read the header: architecture known, every tensor inside the file, no rotary scaling that would get lost.

    Returns:
        Names of the tensors.
    """
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
    linear = fields.get(f"{architecture}.rope.scale_linear", 1)  # before there was a type
    if scaling == "none" and linear != 1:
        scaling = f"rope.scale_linear {linear}"
    elif scaling == "none" and "rope_freqs.weight" in tensors:
        scaling = "rope_freqs.weight"
    if scaling != "none":
        raise ValueError(
            f"{path} scales its rotary frequencies ({scaling}), "
            "which the GGUF reader of transformers drops; use the safetensors checkpoint"
        )
    return tensors


def check_places(path: Path, tensors: list[str], model: Any) -> None:
    """Refuse tensors that no weight of the model was read from: transformers drops them."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == model.config.model_type)
    places = get_tensor_name_map(kind, model.config.num_hidden_layers)
    used = {places.get_name(name, (".weight", ".bias")) for name in model.state_dict()}
    if unused := [name for name in tensors if name not in used and not re.fullmatch(UNUSED, name)]:
        raise ValueError(
            f"{path} holds {some(unused)}, which a {model.config.model_type} model read from GGUF would not use; "
            "use the safetensors checkpoint"
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
    tensors = check_file(path)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype, output_loading_info=True
        )
    except NotImplementedError as error:  # mistral, which llama.cpp writes as llama
        raise ValueError(f"{path} cannot be read by transformers ({error}); use the safetensors checkpoint") from error
    if info["missing_keys"] or info["mismatched_keys"]:
        lacking = sorted(map(str, info["missing_keys"] or info["mismatched_keys"]))
        raise ValueError(
            f"{path} lacks {', '.join(lacking[:3])} in the expected shape; it is damaged or of another model"
        )
    check_places(path, tensors, model)
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
