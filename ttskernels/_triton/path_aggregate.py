"""Running path scores on a GPU: one program folds one path's new scores, in order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttskernels._triton.on_device import on_device


@triton.jit
def path_aggregate_kernel(state, scores, indptr, out):  # state and out [paths, 5]
    path = tl.program_id(0).to(tl.int64)
    at = state + path * 5
    count, least, last = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    total, log_product = tl.load(at + 3), tl.load(at + 4)
    for i in range(tl.load(indptr + path), tl.load(indptr + path + 1)):
        score = tl.load(scores + i)
        count += 1.0
        least = tl.minimum(least, score, propagate_nan=tl.PropagateNan.ALL)
        last = score
        total += score
        log_product += tl.log(score)
    at = out + path * 5
    tl.store(at, count)
    tl.store(at + 1, least)
    tl.store(at + 2, last)
    tl.store(at + 3, total)
    tl.store(at + 4, log_product)


@on_device
def path_aggregate(state: Tensor, scores: Tensor, indptr: Tensor) -> Tensor:
    out = torch.empty_like(state, memory_format=torch.contiguous_format)
    if len(state):
        path_aggregate_kernel[(len(state),)](state.contiguous(), scores.contiguous(), indptr, out, num_warps=1)
    return out
