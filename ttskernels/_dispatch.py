"""Which implementation serves an op: reference | cpu | triton | cuda | auto. An explicit choice runs or raises."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from pathlib import Path
from typing import Literal

import torch

from ttskernels.errors import UnavailableError

Impl = Literal["auto", "reference", "cpu", "triton", "cuda"]
IMPLS = ("auto", "reference", "cpu", "triton", "cuda")


@functools.cache
def load_extension() -> str | None:
    """Load the C++ extension once; None when it is loaded, else the reason why not."""
    if os.environ.get("TTSK_DISABLE_CPP") == "1":
        return "TTSK_DISABLE_CPP=1 is set"
    found = sorted(Path(__file__).parent.glob("_C.*so"))
    if not found:
        return "the C++ extension was not built (no compiler at install time?); run `make build`"
    try:
        torch.ops.load_library(str(found[0]))
        ctypes.CDLL(str(found[0])).ttsk_isa_name  # noqa: B018 - an incomplete library raises here, not later
    except (OSError, AttributeError) as error:
        return f"{found[0].name} did not load: {error}"
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """The extension's C ABI (planner, instruction-set query), for callers that need no tensors."""
    reason = load_extension()
    if reason is not None:
        raise UnavailableError(f"impl 'cpu' is not available: {reason}")
    lib = ctypes.CDLL(str(sorted(Path(__file__).parent.glob("_C.*so"))[0]))
    lib.ttsk_isa_name.restype = ctypes.c_char_p
    return lib


def isa_name() -> str:
    """Level in use: portable, avx2, avx512, avx512_vnni, avx512_bf16, neon or neon_bf16 (TTSK_CPU_ISA forces it)."""
    return library().ttsk_isa_name().decode()


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors: slow, for tests. Set before the first kernel."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def available(impl: str) -> str | None:
    """None if `impl` can run here, else the reason."""
    if impl == "reference":
        return None
    if impl == "cpu":
        return load_extension()
    if impl == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if torch.cuda.is_available() or interpreted():
            return None
        return "no GPU is visible to torch (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)"
    if impl == "cuda":
        from ttskernels import _cuda

        return _cuda.load()
    raise ValueError(f"impl must be one of {IMPLS}, got {impl!r}")


def resolve(impl: str, tensor: torch.Tensor) -> str:
    """The implementation to run for `tensor`; "auto" takes the fastest one that exists for its device."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {IMPLS}, got {impl!r}")
    if impl == "auto":
        fast = "cpu" if tensor.device.type == "cpu" else "triton"
        return fast if available(fast) is None else "reference"
    reason = available(impl)
    if reason is not None:
        raise UnavailableError(f"impl {impl!r} is not available: {reason}")
    if impl == "cpu" and tensor.device.type != "cpu":
        raise ValueError(f"impl 'cpu' needs CPU tensors, got {tensor.device}; move them or pass impl='auto'")
    if impl == "triton" and tensor.device.type == "cpu" and not interpreted():
        raise ValueError("impl 'triton' needs tensors on a GPU, got cpu; move them or pass impl='auto'")
    return impl
