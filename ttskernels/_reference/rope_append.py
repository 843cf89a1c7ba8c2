<<<<<<< HEAD
"""Reference of rope_append: rotate, then write token by token into packed pages."""

from __future__ import annotations
=======
"""Reference of rope_append: norm, rotate halves, scatter into pages; float32 (float64 for float64) inside."""
>>>>>>> attn

import torch
from torch import Tensor

<<<<<<< HEAD
from ttskernels._reference.rms_norm import rms_norm

PAGE_SIZE = 16


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x [rows, heads, dim]`; `cos`, `sin [rows, pairs]`. Element i turns with element i + pairs."""
    pairs = cos.shape[1]
    a, b, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def rope_append(
    q: Tensor, k: Tensor, v: Tensor, inv_freq: Tensor, rope_scale: float, positions: Tensor, slots: Tensor,
    q_norm: Tensor | None, k_norm: Tensor | None, eps: float, k_pages: Tensor, v_pages: Tensor,
) -> Tensor:  # fmt: skip
    dtype = k_pages.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    angles = (positions[:, None].to(inv_freq.dtype) * inv_freq).to(wide)
    cos, sin = angles.cos() * rope_scale, angles.sin() * rope_scale

    def prepare(x: Tensor, norm: Tensor | None) -> Tensor:
        x = x.to(wide)
        if norm is not None:
            x = rms_norm(x.flatten(0, 1), norm.to(wide), eps).view_as(x)
        return rotate(x, cos, sin).to(dtype)

    rotated, keys, values = prepare(q, q_norm), prepare(k, k_norm), v.to(dtype)
    f = k_pages.shape[-1]
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            page, at = divmod(slot, PAGE_SIZE)
            k_pages[page, :, :, at, :] = keys[row].unflatten(-1, (-1, f))
            v_pages[page, :, at // f, :, at % f] = values[row]
    return rotated
=======
from ttskernels.kv import layout


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` `[rows, heads, dim]` with its first `2 * pairs` elements turned; cos, sin `[rows, 1, pairs]`."""
    pairs = cos.shape[-1]
    a, b, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def rope_append(q, k, v, inv_freq, rope_scale, positions, slots, q_norm, k_norm, eps, k_pages, v_pages) -> Tensor:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    angles = positions[:, None].float() * inv_freq.float()  # float32 at every precision, as models are trained
    cos, sin = (f(angles.to(wide))[:, None] * rope_scale for f in (torch.cos, torch.sin))
    turned = []
    for x, norm in ((q, q_norm), (k, k_norm)):
        x = x.to(wide)
        if norm is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm.to(wide)
        turned.append(rotate(x, cos, sin).to(k_pages.dtype))

    packed = k_pages.ndim == 5
    k_nhd, v_nhd = layout.to_nhd(k_pages, v_pages) if packed else (k_pages, v_pages)
    kept = slots >= 0
    page, slot = slots[kept].long() // k_nhd.shape[1], slots[kept].long() % k_nhd.shape[1]
    k_nhd[page, slot] = turned[1][kept]
    v_nhd[page, slot] = v[kept].to(v_pages.dtype)
    if packed:
        for pages, new in zip((k_pages, v_pages), layout.from_nhd(k_nhd, v_nhd), strict=True):
            pages.copy_(new)
    return turned[0]
>>>>>>> attn
