"""Rotary embedding and the write of K and V into pages on a GPU: one program a (row, head)."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ttskernels._triton import tiles
from ttskernels._triton.on_device import on_device


@triton.jit
def load_sum(x, part, bias, output, i, keep, PARTS: tl.constexpr):
    """Elements i of a head: sums of PARTS values, `part` elements apart, and, from `output` on, of a bias that may be None."""
    total = tl.load(x + i, mask=keep, other=0.0).to(tl.float32)
    for p in tl.static_range(1, PARTS):
        total += tl.load(x + p * part + i, mask=keep, other=0.0).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + output + i, mask=keep, other=0.0).to(tl.float32)
    return total


@triton.jit
def turn(x, part, bias, output, norm, cos, sin, eps, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, PARTS: tl.constexpr):
    """The two turned halves and, for partial rotary, the rest: pairs i and i + PAIRS of one head, normed first."""
    d, i = tl.arange(0, triton.next_power_of_2(HEAD_DIM)), tl.arange(0, cos.shape[0])
    scale = 1.0
    if norm is not None:
        wide = load_sum(x, part, bias, output, d, d < HEAD_DIM, PARTS)
        scale = 1.0 / tl.sqrt(tl.sum(wide * wide) / HEAD_DIM + eps)
    a = load_sum(x, part, bias, output, i, i < PAIRS, PARTS) * scale
    b = load_sum(x, part, bias, output, PAIRS + i, i < PAIRS, PARTS) * scale
    rest = load_sum(x, part, bias, output, d, (d >= 2 * PAIRS) & (d < HEAD_DIM), PARTS) * scale
    if norm is not None:
        a *= tl.load(norm + i, mask=i < PAIRS, other=0.0).to(tl.float32)
        b *= tl.load(norm + PAIRS + i, mask=i < PAIRS, other=0.0).to(tl.float32)
        rest *= tl.load(norm + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
    return a * cos - b * sin, b * cos + a * sin, rest


@triton.jit
def store(at, x, keep, MOST: tl.constexpr):
    """Beyond MOST, if there is one, x becomes that, and NaN where it is not finite: what conversions to float8 make of either
    is not the same everywhere."""
    if MOST is not None:
        x = tl.where(tl.abs(x) < float("inf"), tl.clamp(x, -MOST, MOST), float("nan"))
    tl.store(at, x.to(at.dtype.element_ty), mask=keep)


@triton.jit
def store_turned(at, a, b, rest, scale, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, MOST: tl.constexpr):
    d, i = tl.arange(0, rest.shape[0]), tl.arange(0, a.shape[0])
    store(at + i, a * scale, i < PAIRS, MOST)
    store(at + PAIRS + i, b * scale, i < PAIRS, MOST)
    store(at + d, rest * scale, (d >= 2 * PAIRS) & (d < HEAD_DIM), MOST)


@triton.jit
def rope_append_kernel(
    q, k, v, bias, inv_freq, positions, slots, q_norm, k_norm, k_scale, v_scale,  # inputs; bias and the last four may be None
    out, k_pages, v_pages,                                                  # outputs
    rope_scale, eps, q_row, q_head, k_row, k_head, v_row, v_head, part,     # strides in elements
    k_page, k_slot, k_page_head, v_page, v_slot, v_page_head,
    Q_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, PAIRS: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr, PARTS: tl.constexpr, EARLY: tl.constexpr, MOST: tl.constexpr,  # largest value of float8 pages
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, BLOCK_PAIRS)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    angle = tl.load(positions + row).to(tl.float32) * tl.load(inv_freq + i, mask=i < PAIRS, other=0.0)
    cos, sin = tl.cos(angle) * rope_scale, tl.sin(angle) * rope_scale
    if head < Q_HEADS:
        q_at = q + row * q_row + head * q_head
        a, b, rest = turn(q_at, part, bias, head * HEAD_DIM, q_norm, cos, sin, eps, HEAD_DIM, PAIRS, PARTS)
        store_turned(out + (row * Q_HEADS + head) * HEAD_DIM, a, b, rest, 1.0, HEAD_DIM, PAIRS, None)
    else:
        slot = tl.load(slots + row)
        if slot >= 0:
            kv_head = head - Q_HEADS
            page, slot = (slot // PAGE_SIZE).to(tl.int64), slot % PAGE_SIZE
            shrink_k, shrink_v = 1.0, 1.0
            if k_scale is not None:
                shrink_k /= tl.load(k_scale + kv_head)
            if v_scale is not None:
                shrink_v /= tl.load(v_scale + kv_head)
            k_from = k + row * k_row + kv_head * k_head
            a, b, rest = turn(k_from, part, bias, head * HEAD_DIM, k_norm, cos, sin, eps, HEAD_DIM, PAIRS, PARTS)
            k_at = k_pages + page * k_page + slot * k_slot + kv_head * k_page_head
            store_turned(k_at, a, b, rest, shrink_k, HEAD_DIM, PAIRS, MOST)
            d = tl.arange(0, triton.next_power_of_2(V_DIM))
            v_from, output = v + row * v_row + kv_head * v_head, tl.num_programs(1) * HEAD_DIM + kv_head * V_DIM
            value = load_sum(v_from, part, bias, output, d, d < V_DIM, PARTS)
            v_at = v_pages + page * v_page + slot * v_slot + kv_head * v_page_head
            store(v_at + d, value * shrink_v, d < V_DIM, MOST)


@on_device
def rope_append(
    q, k, v, bias, inv_freq, rope_scale, positions, slots, q_norm, k_norm, eps, k_pages, v_pages, k_scale, v_scale, out_dtype
) -> Tensor:
    """q, k, v `[parts, rows, heads, dim]` with one stride between parts."""
    parts, rows, q_heads, head_dim = q.shape
    kv_heads, pairs = k.shape[2], inv_freq.shape[0]
    out = torch.empty(q.shape[1:], dtype=out_dtype, device=q.device)
    most = torch.finfo(k_pages.dtype).max if k_pages.element_size() == 1 else None
    early = parts > 1 and tiles.begins_early(q)  # behind a product that lets others begin
    if rows:
        rope_append_kernel[(rows, q_heads + kv_heads)](
            q, k, v, bias, inv_freq, positions, slots, q_norm, k_norm, k_scale, v_scale,
            out, k_pages, v_pages,
            rope_scale, eps, *q.stride()[1:3], *k.stride()[1:3], *v.stride()[1:3], q.stride(0),
            *k_pages.stride()[:3], *v_pages.stride()[:3],
            q_heads, head_dim, v.shape[3], pairs, k_pages.shape[1], triton.next_power_of_2(max(pairs, 1)), parts, early,
            most, num_warps=1, **tiles.options(None, early),
        )  # fmt: skip
    return out
