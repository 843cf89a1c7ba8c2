"""Reference of rope_append: norm, rotate halves, scatter into pages; float32 (float64 for float64) inside."""

import torch
from torch import Tensor

from ttskernels import layout


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` `[rows, heads, dim]` with its first `2 * pairs` elements turned; cos, sin `[rows, 1, pairs]`."""
    pairs = cos.shape[-1]
    a, b, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def rope_append(
    q, k, v, inv_freq, rope_scale, positions, slots, q_norm, k_norm, eps, k_pages, v_pages
) -> Tensor:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    angles = positions[:, None].float() * inv_freq.float()  # at every precision
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
