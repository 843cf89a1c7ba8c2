"""Linear layers of few rows on a GPU: bound by reading the weight, which begins while the launch in front still runs.

The weight's rows are the rows of a tile (wgmma wants 64), the tokens its columns. Where there are few outputs, several
programs add up to one: a part is a share of the inputs, and whoever reads the parts adds them up in order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from ttskernels._triton.on_device import on_device
from ttskernels._triton.tiles import EARLY_ARCHS, architecture, begins_early, options

SHARED_BYTES = 96 << 10  # of a program, so that two fit a multiprocessor
MOST_PARTS = 12


class LinearTile(NamedTuple):
    """Rows of x, outputs and inputs of a tile, warps, stages of the load pipeline, shares of the inputs, and how many inputs
    of each output's weight a program asks for before the launch in front has ended. Not measured yet, on any GPU."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int
    parts: int
    ahead: int = 512


@triton.jit
def prefetch(at, size):
    """Asks for `size` bytes, a multiple of 16, from each address into the second-level cache."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;", "=r,l,r", [at, size], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def linear_kernel(
    x_rows, w_rows, w, out,  # descriptors of x [rows, inputs] and weight [outputs, inputs]; the weight; [parts, rows, outputs]
    rows, outputs, inputs, part_inputs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr,
    AHEAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """GATED: the weight holds gates and, below them, as many values; out is silu(gate) * value, in one part."""
    n0, part, m0 = tl.program_id(0) * BLOCK_N, tl.program_id(1), tl.program_id(2) * BLOCK_M
    lo = part * part_inputs
    hi = tl.minimum(lo + part_inputs, inputs)
    if EARLY:
        gdc_launch_dependents()
        if AHEAD > 0 and lo < hi:
            n = tl.minimum(n0 + tl.arange(0, BLOCK_N), outputs - 1)
            at = w + n.to(tl.int64) * inputs + lo
            size = tl.minimum(hi - lo, AHEAD) * (w.dtype.element_ty.primitive_bitwidth // 8)
            prefetch(at, size)
            if GATED:
                prefetch(at + tl.cast(outputs, tl.int64) * inputs, size)
        gdc_wait()
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if GATED:
        value = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in tl.range(lo, hi, BLOCK_K, num_stages=STAGES):
        x = x_rows.load([m0, k]).T
        acc = tl.dot(w_rows.load([n0, k]), x, acc, input_precision="ieee")
        if GATED:
            value = tl.dot(w_rows.load([outputs + n0, k]), x, value, input_precision="ieee")
    if GATED:
        acc = acc / (1.0 + tl.exp(-acc)) * value
    m, n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    at = (part * rows + m).to(tl.int64)[None, :] * outputs + n[:, None]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(n[:, None] < outputs) & (m[None, :] < rows))


def choose_tile(rows: int, outputs: int, inputs: int, size: int, gated: bool, processors: int) -> LinearTile:
    """For elements of `size` bytes: two programs a multiprocessor, and as many stages as fit."""
    block_m = min(128, max(16, triton.next_power_of_2(max(1, rows))))
    block_k = 128 // size
    stages = SHARED_BYTES // ((block_m + 64 * (1 + gated)) * block_k * size)
    tiles = triton.cdiv(outputs, 64)  # whatever the rows: they must not change the order of a sum
    most = 1 if gated else min(MOST_PARTS, triton.cdiv(inputs, 2 * block_k))
    return LinearTile(block_m, 64, block_k, 4, min(6, stages), min(most, max(1, 2 * processors // tiles)))


def has_boxes(t: Tensor) -> bool:
    """Whether the device's tensor memory accelerator can read a matrix."""
    return t.is_contiguous() and t.shape[1] * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0


@on_device
def linear(x: Tensor, weight: Tensor, gated: bool, parts: int | None = None, tile: LinearTile | None = None) -> Tensor:
    """float32 `[parts, rows, outputs]`, or, gated, `[1, rows, outputs]` in x's dtype. The vendor's product where there is
    no tensor memory accelerator."""
    rows, inputs = x.shape
    outputs = len(weight) // (1 + gated)
    arch = architecture(x.device)
    if arch not in EARLY_ARCHS or not has_boxes(x) or not has_boxes(weight):
        return vendor(x, weight, gated, outputs)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    tile = tile or choose_tile(rows, outputs, inputs, x.element_size(), gated, processors)
    if parts is not None:
        tile = tile._replace(parts=parts)
    out = torch.empty(tile.parts, rows, outputs, dtype=x.dtype if gated else torch.float32, device=x.device)
    if not rows:
        return out
    descriptors = [
        TensorDescriptor(t, list(t.shape), [t.shape[1], 1], [block, tile.inputs])
        for t, block in ((x, tile.rows), (weight, tile.outputs))
    ]
    share = triton.cdiv(triton.cdiv(inputs, tile.inputs), tile.parts) * tile.inputs
    linear_kernel[triton.cdiv(outputs, tile.outputs), tile.parts, triton.cdiv(rows, tile.rows)](
        *descriptors, weight, out, rows, outputs, inputs, share,
        tile.rows, tile.outputs, tile.inputs, tile.stages, gated, tile.ahead, begins_early(x),
        num_warps=tile.warps, **options(None, begins_early(x)),
    )  # fmt: skip
    return out


def vendor(x: Tensor, weight: Tensor, gated: bool, outputs: int) -> Tensor:
    from ttskernels._triton.silu_mul import silu_mul

    if gated:
        both = x @ weight.T
        return silu_mul(both[:, :outputs], both[:, outputs:])[None]
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, weight.T, out_dtype=torch.float32)[None]
    return (x.float() @ weight.float().T)[None]
