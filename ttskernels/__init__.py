"""Kernels and engine for PRM-guided step search: token ids, tensors and KV pages in, scores and tokens out."""

import os

# Between two operators PyTorch's OpenMP threads spin for about 10 ms, on the cores that our threads (csrc/cpu/threads.cpp)
# work on. 1000 is about 50 us. It is read when libgomp is loaded, so import ttskernels before torch, or set it yourself.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from ttskernels import _ops  # noqa: E402, F401 - defines the op schemas
from ttskernels._dispatch import available, isa_name, load_extension  # noqa: E402

__version__ = "0.1.0"
__all__ = ["__version__", "available", "isa_name", "load_extension"]

load_extension()
