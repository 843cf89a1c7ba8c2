"""Gated MLP activation on a GPU: reads gate and up once, writes their product."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttskernels._triton.on_device import on_device


@triton.jit
def silu_mul_kernel(gate, up, out, gate_row, up_row, dim, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + row * gate_row + d, mask=d < dim, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + d, mask=d < dim, other=0.0).to(tl.float32)
    tl.store(out + row * dim + d, (g / (1.0 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=d < dim)


@on_device
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    rows, dim = gate.shape
    out = torch.empty(rows, dim, dtype=gate.dtype, device=gate.device)
    block = 1024
    if rows:
        grid = (rows, triton.cdiv(dim, block))
        silu_mul_kernel[grid](gate, up, out, gate.stride(0), up.stride(0), dim, block, num_warps=4)
    return out
