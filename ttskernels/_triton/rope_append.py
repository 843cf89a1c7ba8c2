"""Rotary embedding and the write of K and V into pages on a GPU: one program a (row, head)."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def turn(x_at, norm, cos, sin, eps, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr):
    """The two turned halves and, for partial rotary, the rest: pairs i and i + PAIRS of one head, normed first."""
    d, i = tl.arange(0, triton.next_power_of_2(HEAD_DIM)), tl.arange(0, cos.shape[0])
    scale = 1.0
    if norm is not None:
        wide = tl.load(x_at + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(wide * wide) / HEAD_DIM + eps)
    a = tl.load(x_at + i, mask=i < PAIRS, other=0.0).to(tl.float32) * scale
    b = tl.load(x_at + PAIRS + i, mask=i < PAIRS, other=0.0).to(tl.float32) * scale
    rest = tl.load(x_at + d, mask=(d >= 2 * PAIRS) & (d < HEAD_DIM), other=0.0).to(tl.float32) * scale
    if norm is not None:
        a *= tl.load(norm + i, mask=i < PAIRS, other=0.0).to(tl.float32)
        b *= tl.load(norm + PAIRS + i, mask=i < PAIRS, other=0.0).to(tl.float32)
        rest *= tl.load(norm + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
    return a * cos - b * sin, b * cos + a * sin, rest


@triton.jit
def store_turned(at, a, b, rest, scale, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr):
    d, i = tl.arange(0, rest.shape[0]), tl.arange(0, a.shape[0])
    dtype = at.dtype.element_ty
    tl.store(at + i, (a * scale).to(dtype), mask=i < PAIRS)
    tl.store(at + PAIRS + i, (b * scale).to(dtype), mask=i < PAIRS)
    tl.store(at + d, (rest * scale).to(dtype), mask=(d >= 2 * PAIRS) & (d < HEAD_DIM))


@triton.jit
def rope_append_kernel(
    q, k, v, inv_freq, positions, slots, q_norm, k_norm, k_scale, v_scale,  # inputs; the last four may be None
    out, k_pages, v_pages,                                                  # outputs
    rope_scale, eps, q_row, q_head, k_row, k_head, v_row, v_head,           # strides in elements
    k_page, k_slot, k_page_head, v_page, v_slot, v_page_head,
    Q_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, PAIRS: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, BLOCK_PAIRS)
    angle = tl.load(positions + row).to(tl.float32) * tl.load(inv_freq + i, mask=i < PAIRS, other=0.0)
    cos, sin = tl.cos(angle) * rope_scale, tl.sin(angle) * rope_scale
    if head < Q_HEADS:
        a, b, rest = turn(q + row * q_row + head * q_head, q_norm, cos, sin, eps, HEAD_DIM, PAIRS)
        store_turned(out + (row * Q_HEADS + head) * HEAD_DIM, a, b, rest, 1.0, HEAD_DIM, PAIRS)
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
            a, b, rest = turn(k + row * k_row + kv_head * k_head, k_norm, cos, sin, eps, HEAD_DIM, PAIRS)
            k_at = k_pages + page * k_page + slot * k_slot + kv_head * k_page_head
            store_turned(k_at, a, b, rest, shrink_k, HEAD_DIM, PAIRS)
            d = tl.arange(0, triton.next_power_of_2(V_DIM))
            value = tl.load(v + row * v_row + kv_head * v_head + d, mask=d < V_DIM, other=0.0).to(tl.float32)
            v_at = v_pages + page * v_page + slot * v_slot + kv_head * v_page_head
            tl.store(v_at + d, (value * shrink_v).to(v_pages.dtype.element_ty), mask=d < V_DIM)


def rope_append(
    q, k, v, inv_freq, rope_scale, positions, slots, q_norm, k_norm, eps, k_pages, v_pages, k_scale, v_scale, out_dtype
) -> Tensor:
    rows, q_heads, head_dim = q.shape
    kv_heads, pairs = k.shape[1], inv_freq.shape[0]
    out = torch.empty(q.shape, dtype=out_dtype, device=q.device)
    if rows:
        rope_append_kernel[(rows, q_heads + kv_heads)](
            q, k, v, inv_freq, positions, slots, q_norm, k_norm, k_scale, v_scale,
            out, k_pages, v_pages,
            rope_scale, eps, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            *k_pages.stride()[:3], *v_pages.stride()[:3],
            q_heads, head_dim, v.shape[2], pairs, k_pages.shape[1], triton.next_power_of_2(max(pairs, 1)),
            num_warps=1,
        )  # fmt: skip
    return out
