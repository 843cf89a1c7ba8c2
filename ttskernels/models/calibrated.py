"""Files of calibrated int8 weights under the user's cache folder: one for the layers of a checkpoint, one for its head."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ttskernels._cache import cache_root, keep
from ttskernels.models.decoder import CALIBRATED, LM_HEAD
from ttskernels.models.loading import EMBED, Checkpoint
from ttskernels.ops.linear import Rounded

SCALES = ".scales"
ROUNDING = b"groups of 192, 128 or 64, k and v as well"  # part of every name: what was made otherwise is not found
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}  # as `ttsearch calibrate` has them


def is_calibrated(name: str) -> bool:
    """Whether a weight of a decoder's layers is kept in int8."""
    return name.endswith("_proj.weight") and CALIBRATED.of(name) == "int8"


class CalibrationError(ValueError):
    """There is no calibration of these weights, or it cannot be made, kept or read."""


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """A name for weights, of all their bytes."""
    digest = hashlib.sha256(ROUNDING)
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        digest.update(weight.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:24]


def calibration_file(checkpoint: Checkpoint) -> Path:
    """Of the layers. The vocabulary head does not count: a verifier has none, or another."""
    name = fingerprint({name: weight for name, weight in checkpoint.weights.items() if name != LM_HEAD})
    return cache_root() / "int8" / f"{name}.safetensors"


def head_file(layers: Path, checkpoint: Checkpoint) -> Path:
    """Of the vocabulary head, beside the file of the `layers` whose outputs it was rounded for."""
    return layers.with_stem(f"{layers.stem}-{fingerprint({LM_HEAD: _head(checkpoint)})}")


def keep_calibration(checkpoint: Checkpoint, rounded: dict[str, Rounded]) -> Path:
    """Write the files that `read_calibration` reads; returns that of the layers.

    Raises:
        CalibrationError: one cannot be written.
    """
    layers = file = calibration_file(checkpoint)
    try:
        if LM_HEAD in rounded:
            file = head_file(layers, checkpoint)
            keep(file, partial(save_file, _tensors({LM_HEAD: rounded[LM_HEAD]})))
        file = layers
        keep(file, partial(save_file, _tensors({name: r for name, r in rounded.items() if name != LM_HEAD})))
    except (OSError, SafetensorError) as error:
        raise CalibrationError(f"the calibration cannot be kept as {file} ({error}); set TTSK_CACHE to another folder") from error
    return layers


def read_calibration(checkpoint: Checkpoint, lm_head: bool) -> dict[str, Rounded]:
    """The matrices of a checkpoint that was calibrated before, by name.

    Raises:
        CalibrationError: it was not, or its vocabulary head, which is wanted, was not; or a file is damaged.
    """
    layers = calibration_file(checkpoint)
    rounded = _read(layers, checkpoint, {name: weight for name, weight in checkpoint.weights.items() if is_calibrated(name)})
    if lm_head:
        file = head_file(layers, checkpoint)
        if LM_HEAD not in checkpoint.weights and not file.is_file() and _holds_head(layers):
            file = layers
        rounded |= _read(file, checkpoint, {LM_HEAD: _head(checkpoint)})
    return rounded


def _head(checkpoint: Checkpoint) -> Tensor:
    return checkpoint.weights.get(LM_HEAD, checkpoint.weights[EMBED])


def _tensors(rounded: Mapping[str, Rounded]) -> dict[str, Tensor]:
    return {name: r.values for name, r in rounded.items()} | {name + SCALES: r.scales for name, r in rounded.items()}


def _holds_head(layers: Path) -> bool:
    """Files made before heads had their own do; where the head is the embedding, it is the one of these weights."""
    with safe_open(layers, framework="pt") as handle:
        return LM_HEAD in handle.keys()


def _read(file: Path, checkpoint: Checkpoint, weights: Mapping[str, Tensor]) -> dict[str, Rounded]:
    if not file.is_file():
        raise CalibrationError(
            f"weights 'calibrated' needs a calibration of the weights in {checkpoint.folder}, and there is no {file}; "
            f"make it once: ttsearch calibrate {checkpoint.folder} --dtype {DTYPES[checkpoint.config.dtype]}"
        )
    rounded = {}
    try:
        with safe_open(file, framework="pt") as handle:
            for name, weight in weights.items():
                values, scales = handle.get_tensor(name), handle.get_tensor(name + SCALES)
                rounded[name] = Rounded(values, scales, weight.shape[1], checkpoint.config.dtype)
                if rounded[name].shape != tuple(weight.shape):
                    raise ValueError(f"{name} has {len(values)} rows, not {len(weight)}")
    except (SafetensorError, OSError, ValueError) as error:
        raise CalibrationError(f"{file} is no calibration of these weights ({error}); remove it and calibrate again") from error
    return rounded
