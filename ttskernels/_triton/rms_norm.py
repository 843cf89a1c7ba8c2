"""RMS norm of rows on a GPU; one program a row, kept in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rms_norm_kernel(x, weight, out, eps, x_row, DIM: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, triton.next_power_of_2(DIM))
    wide = tl.load(x + row * x_row + d, mask=d < DIM, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide) / DIM + eps)
    w = tl.load(weight + d, mask=d < DIM, other=0.0).to(tl.float32)
    tl.store(out + row * DIM + d, (wide * scale * w).to(out.dtype.element_ty), mask=d < DIM)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows, dim = x.shape
    out = torch.empty(rows, dim, dtype=x.dtype, device=x.device)
    if rows:
        rms_norm_kernel[(rows,)](x, weight, out, eps, x.stride(0), dim, num_warps=warps(dim))
    return out


def warps(dim: int) -> int:
    """One warp for 512 elements, 1 to 16: up to 16 a thread."""
    return min(16, max(1, triton.next_power_of_2(dim) // 512))
