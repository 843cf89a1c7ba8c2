"""CUDA C++ kernels (csrc/cuda), reached through a C ABI: a library of its own, loaded only where there is a GPU."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from ttskernels.errors import UnavailableError

PATH = Path(__file__).parents[1] / "_C_cuda.so"


@functools.cache
def load() -> str | None:
    """None when the library is loaded, else the reason why not."""
    if not torch.cuda.is_available():
        return "no GPU is visible to torch"
    if torch.version.hip:
        return "this torch is for AMD GPUs"
    if not PATH.exists():
        return "the CUDA library was not built (no nvcc at install time?); run `make build` where nvcc is"
    try:
        open_library(PATH)
    except (OSError, AttributeError) as error:
        return f"{PATH.name} did not load: {error}"
    return None


@functools.cache
def open_library(path: Path) -> ctypes.CDLL:
    lib, pointer = ctypes.CDLL(str(path)), ctypes.c_void_p
    lib.ttsk_cuda_plan_advance.argtypes = (pointer, pointer, pointer)
    lib.ttsk_cuda_page_copy.argtypes = (pointer, ctypes.c_int32, pointer, ctypes.c_int32, pointer)
    return lib


def call(name: str, device: torch.device, *args) -> None:
    """Launch on the device's current stream; `args` are tensors (their addresses) and integers."""
    reason = load()
    if reason is not None:
        raise UnavailableError(f"impl 'cuda' is not available: {reason}")
    with torch.cuda.device(device):
        values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]
        error = getattr(open_library(PATH), name)(*values, torch.cuda.current_stream(device).cuda_stream)
    if error:
        raise RuntimeError(f"{name}: CUDA error {error}")
