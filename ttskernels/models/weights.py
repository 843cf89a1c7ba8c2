"""Weight files: safetensors, or PyTorch's .bin read without running anything in it."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttskernels.models.layouts import HEAD_FILES, WRAPPER

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
MAIN_FILES = (  # the first that is there
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def weight_files(folder: Path) -> list[Path]:
    """The files of a checkpoint, safetensors before .bin, and a head kept in a file of its own.

    Raises:
        FileNotFoundError: none, or one that the index names is missing.
    """
    main = main_file(folder)
    if main is None:
        found = sorted(set(folder.glob("*.safetensors")) - {folder / name for name in ADAPTER_FILES})
        if len(found) != 1:
            raise FileNotFoundError(
                f"{folder} must hold one of {', '.join(MAIN_FILES)}, got {some([f.name for f in found])}"
            )
    elif main.suffix == ".json":
        places = read_json(main).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise ValueError(f"{main} must name the file of every weight under weight_map, got {places!r:.60}; download it again")
        found = [folder / name for name in sorted(set(places.values()))]
        if absent := next((file for file in found if not file.is_file()), None):
            raise FileNotFoundError(f"{absent} is named by {main.name} but is missing; the download is incomplete")
    else:
        found = [main]
    return found + [folder / name for name in HEAD_FILES if (folder / name).is_file()]


def main_file(folder: Path) -> Path | None:
    """The file, or index of files, with a whole model's weights."""
    return next((folder / name for name in MAIN_FILES if (folder / name).is_file()), None)


def read_weights(files: Iterable[Path]) -> dict[str, Tensor]:
    """Every weight of `files` by the name it has in the model; tensors are mapped from the files, not copied.

    Raises:
        ValueError: a damaged file, one that holds code, a weight that is there twice, one that is not a float, or a number.
    """
    weights: dict[str, Tensor] = {}
    for file in files:
        prefix = HEAD_FILES.get(file.name, "")
        for stored, tensor in _read_file(file).items():
            name = prefix + stored.removeprefix(WRAPPER)
            if name.endswith("rotary_emb.inv_freq"):  # old checkpoints stored it; it follows from config.json
                continue
            if name in weights:
                raise ValueError(f"{file}: {stored} is there twice; the files are of two checkpoints")
            if tensor.dtype not in (*DTYPES, torch.float64):
                raise ValueError(
                    f"{file}: {stored} must be a 16, 32 or 64-bit float, got {tensor.dtype}; "
                    "use the unquantised checkpoint"
                )
            if tensor.ndim == 0:
                raise ValueError(f"{file}: {stored} must be a matrix or a vector, got one number; download the file again")
            weights[name] = tensor
    return weights


def _read_file(file: Path) -> dict[str, Tensor]:
    return _read_safetensors(file) if file.suffix == ".safetensors" else _read_bin(file)


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a complete safetensors file ({error}); download it again") from error


def _read_bin(file: Path) -> dict[str, Tensor]:
    mapped = zipfile.is_zipfile(file)  # else torch's format before 1.6, or a damaged file
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # the reader indexes into whatever bytes there are: any error means a bad file
        code = re.search(r"(?i)(?:unsupported global:?(?: global)?|unrecognized function) ([\w.]+)", str(error))
        if code and isinstance(error, pickle.UnpicklingError):
            raise ValueError(
                f"{file} asks to load {code[1]}: it holds more than tensors, which could run any code; "
                "it is not opened: use the safetensors checkpoint, or convert it where you trust it"
            ) from error
        raise ValueError(
            f"{file} is not a complete PyTorch weight file ({_cause(error)}); download it again"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise ValueError(
            f"{file} must hold a dict of tensors, got {type(content).__name__} with other content; "
            "save the model's state_dict"
        )
    return content


def _cause(error: Exception) -> str:
    """The line of torch's long message that says what was wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "Unsupported" in line), (lines or [type(error).__name__])[0])


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file."""
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {content!r:.60}; download it again")
    return content


def some(names: list[str], limit: int = 3) -> str:
    """The first names of a list, for a message."""
    shown = ", ".join(names[:limit]) or "nothing"
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
