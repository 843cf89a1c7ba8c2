"""Which device a model runs on, and what the planner should know about it."""

from __future__ import annotations

from dataclasses import replace

import torch

from ttskernels import _dispatch
from ttskernels.errors import UnavailableError
from ttskernels.kv.machines import DEVICES, H100, gpu_machine
from ttskernels.kv.plan_layout import HeadShape, Machine

FLOAT8_CAPABILITY = (8, 9)


def check_device(device: str | torch.device, impl: str) -> tuple[torch.device, str]:
    """The device, and the implementation that runs on it where `impl` is "auto".

    Raises:
        ValueError: another kind of device, or an `impl` that does not run there.
        UnavailableError: no GPU, or no Triton.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ValueError(f'device must be "cpu" or "cuda" (or "cuda:1", ...), got {str(device)!r}')
    if found.type == "cpu":
        return found, impl
    if impl not in ("auto", "triton"):
        raise ValueError(f'impl must be "auto" or "triton" on device {str(found)!r}, got {impl!r}')
    if not torch.cuda.is_available():
        raise UnavailableError(f'device {str(found)!r} is not available: no GPU is visible to torch; use device="cpu"')
    if (found.index or 0) >= torch.cuda.device_count():
        raise UnavailableError(f"device {str(found)!r} is not available: torch sees {torch.cuda.device_count()} GPUs")
    if reason := _dispatch.available("triton"):
        raise UnavailableError(f"device {str(found)!r} is not available: {reason}")
    return torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index), "triton"


def check_float8(device: torch.device) -> None:
    """Raise where Triton does not convert to float8_e4m3fn."""
    if device.type != "cuda" or torch.version.hip:
        return
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < FLOAT8_CAPABILITY:
        raise UnavailableError(
            f'kv "fp8" is not available: it needs a GPU of compute capability {".".join(map(str, FLOAT8_CAPABILITY))} or more, '
            f'{device} has {major}.{minor}; pass kv="float"'
        )


def device_machine(device: torch.device, heads: HeadShape) -> Machine:
    """Planner constants of a GPU: its own number of processors, the rest as the nearest one that is known (an H100)."""
    from ttskernels._triton.tiles import architecture, lookup

    tiles = lookup(architecture(device), heads.head_dim, heads.v_dim, heads.kv_bytes)
    if device.type != "cuda":  # the interpreter: as few programs as there can be more than one of
        return gpu_machine(heads, replace(H100, processors=heads.kv_heads), tiles.large.rows)
    found = torch.cuda.get_device_properties(device)
    known = next((known for known in DEVICES.values() if known.name in found.name), H100)
    return gpu_machine(heads, replace(known, processors=found.multi_processor_count), tiles.large.rows)
