"""RMS norm of rows on a GPU; one program a row, kept in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ttskernels._triton.on_device import on_device
from ttskernels._triton.tiles import begins_early, options


@triton.jit
def rms_norm_kernel(x, weight, out, eps, x_row, DIM: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, triton.next_power_of_2(DIM))
    wide = tl.load(x + row * x_row + d, mask=d < DIM, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide) / DIM + eps)
    w = tl.load(weight + d, mask=d < DIM, other=0.0).to(tl.float32)
    tl.store(out + row * DIM + d, (wide * scale * w).to(out.dtype.element_ty), mask=d < DIM)


@on_device
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows, dim = x.shape
    out = torch.empty(rows, dim, dtype=x.dtype, device=x.device)
    if rows:
        rms_norm_kernel[(rows,)](x, weight, out, eps, x.stride(0), dim, num_warps=warps(dim))
    return out


@triton.jit
def add_rms_norm_kernel(
    parts, x, bias, weight, out, eps, rows, x_row, PARTS: tl.constexpr, DIM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One row of x, plus its parts in order and a bias that may be None, in place; out is its norm."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, triton.next_power_of_2(DIM))
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    w = tl.load(weight + d, mask=d < DIM, other=0.0).to(tl.float32)
    total = tl.load(parts + row * DIM + d, mask=d < DIM, other=0.0)
    for p in tl.static_range(1, PARTS):
        total += tl.load(parts + (p * rows + row) * DIM + d, mask=d < DIM, other=0.0)
    if bias is not None:
        total += tl.load(bias + d, mask=d < DIM, other=0.0).to(tl.float32)
    total += tl.load(x + row * x_row + d, mask=d < DIM, other=0.0).to(tl.float32)
    rounded = total.to(x.dtype.element_ty)
    tl.store(x + row * x_row + d, rounded, mask=d < DIM)
    wide = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide) / DIM + eps)
    tl.store(out + row * DIM + d, (wide * scale * w).to(out.dtype.element_ty), mask=d < DIM)


@on_device
def add_rms_norm(parts: Tensor, x: Tensor, bias: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    rows, dim = x.shape
    out = torch.empty(rows, dim, dtype=x.dtype, device=x.device)
    if rows:
        add_rms_norm_kernel[(rows,)](
            parts, x, bias, weight, out, eps, rows, x.stride(0), parts.shape[0], dim, begins_early(x),
            num_warps=warps(dim), **options(None, begins_early(x)),
        )  # fmt: skip
    return out


def warps(dim: int) -> int:
    """One warp for 512 elements, 1 to 16: up to 16 a thread."""
    return min(16, max(1, triton.next_power_of_2(dim) // 512))
