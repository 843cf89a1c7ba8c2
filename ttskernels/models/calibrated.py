"""Files of calibrated int8 weights, one for each checkpoint's weights, under the user's cache folder."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ttskernels._cache import cache_root
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


def fingerprint(checkpoint: Checkpoint) -> str:
    """A name for weights, of all their bytes. The vocabulary head does not count: a verifier has none."""
    digest = hashlib.sha256(ROUNDING)
    for name, weight in sorted(checkpoint.weights.items()):
        if name == LM_HEAD:
            continue
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        digest.update(weight.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:24]


def calibration_file(checkpoint: Checkpoint) -> Path:
    return cache_root() / "int8" / f"{fingerprint(checkpoint)}.safetensors"


def keep_calibration(checkpoint: Checkpoint, rounded: dict[str, Rounded]) -> Path:
    """Write the file that `read_calibration` reads.

    Raises:
        CalibrationError: it cannot be written.
    """
    file = calibration_file(checkpoint)
    tensors = {name: r.values for name, r in rounded.items()} | {name + SCALES: r.scales for name, r in rounded.items()}
    fresh = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, fresh)
            fresh.replace(file)
        finally:
            fresh.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise CalibrationError(f"the calibration cannot be kept as {file} ({error}); set TTSK_CACHE to another folder") from error
    return file


def read_calibration(checkpoint: Checkpoint, lm_head: bool) -> dict[str, Rounded]:
    """The matrices of a checkpoint that was calibrated before, by name.

    Raises:
        CalibrationError: it was not, or the file is damaged, or it lacks the vocabulary head that is wanted.
    """
    file = calibration_file(checkpoint)
    if not file.is_file():
        raise CalibrationError(
            f"weights 'calibrated' needs a calibration of the weights in {checkpoint.folder}, and there is no {file}; "
            f"make it once: ttsearch calibrate {checkpoint.folder} --dtype {DTYPES[checkpoint.config.dtype]}"
        )
    shapes = {name: weight.shape for name, weight in checkpoint.weights.items() if is_calibrated(name)}
    if lm_head:
        shapes[LM_HEAD] = checkpoint.weights.get(LM_HEAD, checkpoint.weights[EMBED]).shape
    rounded = {}
    try:
        with safe_open(file, framework="pt") as handle:
            for name, shape in shapes.items():
                values, scales = handle.get_tensor(name), handle.get_tensor(name + SCALES)
                rounded[name] = Rounded(values, scales, shape[1], checkpoint.config.dtype)
                if rounded[name].shape != tuple(shape):
                    raise ValueError(f"{name} has {len(values)} rows, not {shape[0]}")
    except (SafetensorError, OSError, ValueError) as error:
        raise CalibrationError(f"{file} is no calibration of these weights ({error}); remove it and calibrate again") from error
    return rounded
