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
        turned.append(rotate(x, cos, sin))

    kept = slots >= 0
    page_size = k_pages.shape[1] if k_pages.ndim == 4 else layout.PAGE_SIZE
    page, slot = slots[kept].long() // page_size, slots[kept].long() % page_size
    if layout.is_fixed(k_pages):
        layout.put_fixed(k_pages, page, slot, turned[1][kept], keys=True)
        layout.put_fixed(v_pages, page, slot, v[kept].to(wide), keys=False)
        return turned[0].to(q.dtype)
    turned = [x.to(k_pages.dtype) for x in turned]
    keys, values = turned[1][kept], v[kept].to(v_pages.dtype)
    if k_pages.ndim == 4:
        k_pages[page, slot], v_pages[page, slot] = keys, values
        return turned[0]
    used, at = torch.unique(page, return_inverse=True)  # the pool may be huge: touch the written pages only
    k_nhd, v_nhd = layout.to_nhd(k_pages[used], v_pages[used])
    k_nhd[at, slot], v_nhd[at, slot] = keys, values
    k_pages[used], v_pages[used] = layout.from_nhd(k_nhd, v_nhd)
    return turned[0]
