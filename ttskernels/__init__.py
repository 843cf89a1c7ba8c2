"""Kernels and engine for PRM-guided step search: token ids, tensors and KV pages in, scores and tokens out."""

from ttskernels import _ops  # noqa: F401 - defines the op schemas
from ttskernels._dispatch import available, isa_name, load_extension

__version__ = "0.1.0"
__all__ = ["__version__", "available", "isa_name", "load_extension"]

load_extension()
