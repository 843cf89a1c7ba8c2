"""Step scores on a GPU: the head reads only the scored rows; an inner layer runs on the tensor cores before it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttskernels._triton.on_device import on_device
from ttskernels._triton.rms_norm import warps


@triton.jit
def inner_kernel(
    hidden, rows, norm_weight, weight, bias, out,  # norm_weight and bias may be None; out [n, inner] float32
    n, inner, eps, hidden_row, DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_at = hidden + tl.load(rows + m, mask=m < n, other=0).to(tl.int64) * hidden_row
    scale = tl.full([BLOCK_M], 1.0, tl.float32)
    if norm_weight is not None:
        squares = tl.zeros([BLOCK_M], tl.float32)
        for first in range(0, DIM, BLOCK_K):
            x = tl.load(x_at[:, None] + (first + k)[None, :], mask=(first + k)[None, :] < DIM, other=0.0).to(tl.float32)
            squares += tl.sum(x * x, 1)
        scale = 1.0 / tl.sqrt(squares / DIM + eps)
    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, DIM, BLOCK_K):
        at = first + k
        x = tl.load(x_at[:, None] + at[None, :], mask=at[None, :] < DIM, other=0.0).to(tl.float32) * scale[:, None]
        if norm_weight is not None:
            x *= tl.load(norm_weight + at, mask=at < DIM, other=0.0).to(tl.float32)[None, :]
        w_mask = (at[:, None] < DIM) & (col[None, :] < inner)
        w = tl.load(weight + col[None, :].to(tl.int64) * DIM + at[:, None], mask=w_mask, other=0.0)
        y = tl.dot(x.to(w.dtype), w, y, input_precision="ieee")
    if bias is not None:
        y += tl.load(bias + col, mask=col < inner, other=0.0).to(tl.float32)[None, :]
    y = tl.where(tl.abs(y) < float("inf"), tl.maximum(y, 0.0), float("nan"))  # what is not finite must stay so
    tl.store(out + m[:, None].to(tl.int64) * inner + col[None, :], y, mask=(m[:, None] < n) & (col[None, :] < inner))


@triton.jit
def head_kernel(
    hidden, rows, norm_weight, weight, bias, mix, scores,  # rows (all), norm_weight, bias, mix may be None
    eps, hidden_row, DIM: tl.constexpr, LABELS: tl.constexpr, SQUASH: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    row = i
    if rows is not None:
        row = tl.load(rows + i).to(tl.int64)
    d, label = tl.arange(0, triton.next_power_of_2(DIM)), tl.arange(0, triton.next_power_of_2(LABELS))
    x = tl.load(hidden + row * hidden_row + d, mask=d < DIM, other=0.0).to(tl.float32)
    finite = tl.min((tl.abs(x) < float("inf")).to(tl.int32)) > 0
    if norm_weight is not None:
        x *= 1.0 / tl.sqrt(tl.sum(x * x) / DIM + eps)
        x *= tl.load(norm_weight + d, mask=d < DIM, other=0.0).to(tl.float32)
    logits = tl.zeros([label.shape[0]], tl.float32)
    for l in range(LABELS):
        w = tl.load(weight + l * DIM + d, mask=d < DIM, other=0.0).to(tl.float32)
        logits = tl.where(label == l, tl.sum(x * w), logits)
    if bias is not None:
        logits += tl.load(bias + label, mask=label < LABELS, other=0.0).to(tl.float32)
    finite = finite & (tl.min((tl.abs(logits) < float("inf")).to(tl.int32)) > 0)
    if SQUASH == "softmax":
        logits = tl.where(label < LABELS, logits, float("-inf"))
        values = tl.exp(logits - tl.max(logits))
        total = tl.sum(values)
    elif SQUASH == "sigmoid":
        e = tl.exp(-tl.abs(logits))
        values = tl.where(logits >= 0.0, 1.0, e) / (1.0 + e)
    else:
        values = logits
    if mix is not None:
        values *= tl.load(mix + label, mask=label < LABELS, other=0.0)
    score = tl.sum(tl.where(label < LABELS, values, 0.0))
    if SQUASH == "softmax":
        score = tl.div_rn(score, total)  # at the end, and rounded once: a mix within [0, 1] gives no score above 1
    tl.store(scores + i, tl.where(finite, score, float("nan")))


@on_device
def step_score(
    hidden, rows, norm_weight, eps, inner_weight, inner_bias, weight, bias, squash, mix
) -> Tensor:
    n, dim = rows.shape[0], hidden.shape[1]
    scores = torch.empty(n, dtype=torch.float32, device=hidden.device)
    if n == 0:
        return scores
    if inner_weight is not None:
        inner = inner_weight.shape[0]
        y = torch.empty(n, inner, dtype=torch.float32, device=hidden.device)
        block_m, block_n = (16, 32) if n <= 64 else (64, 64)
        inner_kernel[(triton.cdiv(n, block_m), triton.cdiv(inner, block_n))](
            hidden, rows, norm_weight, inner_weight, inner_bias, y,
            n, inner, eps, hidden.stride(0), dim, block_m, block_n, 64, num_warps=4,
        )  # fmt: skip
        hidden, rows, norm_weight, dim = y, None, None, inner
    head_kernel[(n,)](
        hidden, rows, norm_weight, weight, bias, mix, scores,
        eps, hidden.stride(0), dim, weight.shape[0], squash, num_warps=warps(dim),
    )  # fmt: skip
    return scores
