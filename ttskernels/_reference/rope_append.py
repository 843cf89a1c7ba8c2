"""Reference of rope_append: rotate, then write token by token into packed pages."""

from __future__ import annotations

import torch
from torch import Tensor

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
