"""Log-probabilities of given tokens on a GPU: the vocabulary in tiles, an online log-sum-exp over each run of them.

Three launches: gather and norm of the rows, products and running sums of (row block, run of tiles), the merge of the
runs. Scratch is `3 * n` floats a run; logits live in registers only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttskernels._triton.on_device import on_device
from ttskernels._triton.rms_norm import warps
from ttskernels._triton.tiles import architecture

LOG2E = tl.constexpr(1.4426950408889634)
NEG_INF = tl.constexpr(float("-inf"))


@triton.jit
def gather_norm_kernel(hidden, rows, norm_weight, x, eps, hidden_row, DIM: tl.constexpr):  # norm_weight may be None
    i = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, triton.next_power_of_2(DIM))
    row = tl.load(rows + i).to(tl.int64)
    wide = tl.load(hidden + row * hidden_row + d, mask=d < DIM, other=0.0).to(tl.float32)
    if norm_weight is not None:
        wide *= 1.0 / tl.sqrt(tl.sum(wide * wide) / DIM + eps)
        wide *= tl.load(norm_weight + d, mask=d < DIM, other=0.0).to(tl.float32)
    tl.store(x + i * DIM + d, wide.to(x.dtype.element_ty), mask=d < DIM)


@triton.jit
def run_kernel(
    x, lm_head, ids,    # inputs  [n, dim] normed, [vocab, dim], [n]
    partial,            # output  [runs, 3, n]: maximum, sum of exponentials from it, logit of the row's id (or 0)
    n, vocab, head_row,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # Row blocks of one run follow each other, so they share its tiles in the cache.
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    run, runs = tl.program_id(1), tl.num_programs(1)
    k, j = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_N)
    wanted = tl.load(ids + row, mask=row < n, other=-1)
    x_at = x + tl.where(row < n, row, 0).to(tl.int64) * DIM
    m = tl.full([BLOCK_M], NEG_INF, tl.float32)
    l, picked = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    tiles = tl.cdiv(vocab, BLOCK_N)
    share = tl.cdiv(tiles, runs)
    for tile in range(run * share, tl.minimum((run + 1) * share, tiles)):
        token = tile * BLOCK_N + j
        head_at = lm_head + tl.where(token < vocab, token, 0).to(tl.int64) * head_row
        s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in tl.range(0, DIM, BLOCK_K, num_stages=STAGES):
            inside = first + k < DIM
            a = tl.load(x_at[:, None] + (first + k)[None, :], mask=inside[None, :], other=0.0)
            w = tl.load(head_at[None, :] + (first + k)[:, None], mask=inside[:, None], other=0.0)
            s = tl.dot(a, w, s, input_precision="ieee")
        picked += tl.sum(tl.where(token[None, :] == wanted[:, None], s, 0.0), 1)
        s = tl.where((token < vocab)[None, :], s, NEG_INF)
        top = tl.maximum(m, tl.max(s, 1))
        shift = tl.where(top == NEG_INF, 0.0, top)
        l = l * tl.exp2((m - shift) * LOG2E) + tl.sum(tl.exp2((s - shift[:, None]) * LOG2E), 1)
        m = top
    at = partial + run.to(tl.int64) * 3 * n + row
    tl.store(at, m, mask=row < n)
    tl.store(at + n, l, mask=row < n)
    tl.store(at + 2 * n, picked, mask=row < n)


@triton.jit
def merge_kernel(partial, logprobs, n, runs, BLOCK: tl.constexpr):
    i, r = tl.program_id(0), tl.arange(0, BLOCK)
    at = partial + r.to(tl.int64) * 3 * n + i
    m = tl.load(at, mask=r < runs, other=NEG_INF)
    l = tl.load(at + n, mask=r < runs, other=0.0)
    picked = tl.sum(tl.load(at + 2 * n, mask=r < runs, other=0.0))
    top = tl.max(m)
    total = tl.sum(l * tl.exp2((m - top) * LOG2E))
    value = picked - (top + tl.log(total))
    tl.store(logprobs + i, tl.where(tl.abs(value) < float("inf"), value, float("nan")))


@on_device
def token_logprob(
    hidden: Tensor, rows: Tensor, norm_weight: Tensor | None, eps: float, lm_head: Tensor, ids: Tensor
) -> Tensor:
    n, (vocab, dim) = len(rows), lm_head.shape
    logprobs = torch.empty(n, dtype=torch.float32, device=hidden.device)
    if n == 0:
        return logprobs
    x = torch.empty(n, dim, dtype=lm_head.dtype, device=hidden.device)
    gather_norm_kernel[(n,)](hidden, rows, norm_weight, x, eps, hidden.stride(0), dim, num_warps=warps(dim))
    block_m, block_n, block_k, num_warps, stages = choose_blocks(n, lm_head.element_size(), architecture(lm_head.device))
    row_blocks, tiles = triton.cdiv(n, block_m), triton.cdiv(vocab, block_n)
    share = triton.cdiv(tiles, max(1, programs(lm_head.device) // row_blocks))
    runs = triton.cdiv(tiles, share)
    partial = torch.empty(runs, 3, n, dtype=torch.float32, device=hidden.device)
    run_kernel[(row_blocks, runs)](
        x, lm_head, ids, partial,
        n, vocab, lm_head.stride(0), dim, block_m, block_n, block_k, stages, num_warps=num_warps,
    )  # fmt: skip
    merge_kernel[(n,)](partial, logprobs, n, runs, triton.next_power_of_2(runs), num_warps=4)
    return logprobs


def choose_blocks(n: int, weight_bytes: int, arch: str) -> tuple[int, int, int, int, int]:
    """(rows, tokens, dims of a tile, warps, stages). No GPU has timed them yet."""
    stages = 2 if arch == "gfx942" else 3
    if weight_bytes == 4:  # for checks, not for speed
        return 16, 64, 32, 4, stages
    if n <= 16:  # limited by reading the head: 96 KiB of it on the way to each multiprocessor
        return 16, 64, 128, 4, 2 if arch == "gfx942" else 4
    return (64, 128, 64, 4, stages) if n <= 64 else (128, 128, 64, 8, stages)


def programs(device: torch.device) -> int:
    """Programs of `run_kernel` to aim for: two a multiprocessor."""
    if device.type != "cuda":
        return 5
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count
