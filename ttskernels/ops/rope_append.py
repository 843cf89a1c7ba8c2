"""Rotary positions on queries and keys, and keys and values written to their KV pages, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ttskernels._dispatch import Impl, resolve
from ttskernels._reference import rope_append as reference


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inv_freq: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    *,
    rope_scale: float = 1.0,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    impl: Impl = "auto",
) -> Tensor:
    """Rotate `q` and `k` to their positions; write `k` and `v` of every row with a slot into packed pages.

    Args:
        q: `[rows, q_heads, head_dim]`, dtype of the pages or float32; `k`, `v`: `[rows, kv_heads, dim]` likewise.
        inv_freq: `[pairs]` float32, at most head_dim / 2: element i of a head turns with element i + pairs, the rest stays.
        positions, slots: `[rows]` int32; slot = page * 16 + offset, -1 writes nothing.
        k_pages, v_pages: packed pages of one layer (docs/internals.md); modified.
        rope_scale: factor on cos and sin (YaRN).
        q_norm, k_norm: `[head_dim]`: RMS norm of each head before the rotation (Qwen3).
    Returns:
        Rotated queries, dtype of the pages.
    Raises:
        ValueError: shape or dtype mismatch, a slot outside the pages.
    Source: Su et al. 2021, arXiv:2104.09864.
    """
    rows = q.shape[0]
    if q.ndim != 3 or k.ndim != 3 or v.ndim != 3 or k.shape[0] != rows or v.shape[0] != rows or k.shape[1] != v.shape[1]:
        raise ValueError(
            f"q, k, v must be [rows, heads, dim] of the same rows, k and v of the same heads, got {tuple(q.shape)}, "
            f"{tuple(k.shape)}, {tuple(v.shape)}"
        )
    if positions.shape != (rows,) or slots.shape != (rows,) or positions.dtype != torch.int32 or slots.dtype != torch.int32:
        raise ValueError(
            f"positions and slots must be int32 [{rows}], got {positions.dtype} {tuple(positions.shape)} and "
            f"{slots.dtype} {tuple(slots.shape)}; pass .to(torch.int32)"
        )
    if k_pages.ndim != 5 or k_pages.dtype != v_pages.dtype or q.dtype not in (k_pages.dtype, torch.float32):
        raise ValueError(
            f"k_pages and v_pages must be packed 5-D pages of q's dtype {q.dtype} (or q float32), got "
            f"{tuple(k_pages.shape)} {k_pages.dtype} and {tuple(v_pages.shape)} {v_pages.dtype}"
        )
    limit = k_pages.shape[0] * k_pages.shape[3]
    if rows and not -1 <= int(slots.min()) <= int(slots.max()) < limit:
        raise ValueError(f"slots must lie in -1 .. {limit - 1}, got {int(slots.min())} .. {int(slots.max())}")
    if resolve(impl, q) == "cpu":
        return torch.ops.ttskernels.rope_append(
            q.contiguous(), k.contiguous(), v.contiguous(), inv_freq, rope_scale, positions, slots, q_norm, k_norm, eps,
            k_pages, v_pages,
        )  # fmt: skip
    return reference.rope_append(q, k, v, inv_freq, rope_scale, positions, slots, q_norm, k_norm, eps, k_pages, v_pages)
