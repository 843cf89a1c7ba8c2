"""path_aggregate: one new step score for each of n paths, against the reference's loop."""

import pytest
import torch

from ttskernels import _dispatch
from ttskernels.ops.path_aggregate import empty_state, path_aggregate

IMPLS = ["reference", *(["cpu"] if _dispatch.load_extension() is None else [])]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("paths", [16, 256])
def bench_path_aggregate(benchmark, annotate, paths, impl):
    state, scores, indptr = empty_state(paths), torch.rand(paths), torch.arange(paths + 1, dtype=torch.int32)
    benchmark(path_aggregate, state, scores, indptr, impl=impl)
    annotate(num_bytes=paths * (5 + 1 + 5 + 1) * 4)
