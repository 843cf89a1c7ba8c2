"""rms_norm against torch's: rows of SmolLM2 (576) and Qwen2.5-1.5B (1536). Bytes counted: x read, y written, weight once."""

import pytest
import torch

from ttskernels import _dispatch
from ttskernels.ops.rms_norm import rms_norm

IMPLS = ["reference", "torch", *(["cpu"] if _dispatch.load_extension() is None else [])]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dim", [576, 1536])
@pytest.mark.parametrize("rows", [1, 64, 1024])
def bench_rms_norm(benchmark, annotate, rows, dim, impl):
    x, weight = torch.randn(rows, dim, dtype=torch.bfloat16), torch.ones(dim, dtype=torch.bfloat16)
    if impl == "torch":
        benchmark(torch.nn.functional.rms_norm, x, (dim,), weight, 1e-6)
    else:
        benchmark(rms_norm, x, weight, impl=impl)
    annotate(num_bytes=2 * x.nbytes + weight.nbytes)
