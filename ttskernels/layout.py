"""The packed KV layout: sixteen-token pages with the tokens of one page in the lanes of one vector.

K `[pages, kv_heads, head_dim / f, 16, f]`, V `[pages, kv_heads, 16 / f, v_dim, f]`; f = 2 for bf16, else 1.
"""

import torch
from torch import Tensor

PAGE_SIZE = 16


def pack_factor(dtype: torch.dtype) -> int:
    """Elements of the reduced dimension that lie side by side."""
    return 2 if dtype == torch.bfloat16 else 1


def new_pages(
    num_pages: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    v_dim: int | None = None,
    *,
    layers: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Uninitialised packed pages `(k, v)`; with `layers`, a leading dimension of that size."""
    f, lead = pack_factor(dtype), () if layers is None else (layers,)
    k = torch.empty(*lead, num_pages, kv_heads, head_dim // f, PAGE_SIZE, f, dtype=dtype)
    v = torch.empty(*lead, num_pages, kv_heads, PAGE_SIZE // f, v_dim or head_dim, f, dtype=dtype)
    return k, v


def to_nhd(k_pages: Tensor, v_pages: Tensor) -> tuple[Tensor, Tensor]:
    """Copy packed pages to token-major `[pages, 16, kv_heads, head_dim]` and `[..., v_dim]`."""
    k = k_pages.permute(0, 3, 1, 2, 4).flatten(3)
    v = v_pages.permute(0, 2, 4, 1, 3).flatten(1, 2)
    return tuple(t.clone(memory_format=torch.contiguous_format) for t in (k, v))  # with f = 1 those are views


def from_nhd(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Copy token-major `[pages, 16, kv_heads, dim]` tensors to packed pages: the inverse of `to_nhd`."""
    f = pack_factor(k.dtype)
    k_pages = k.unflatten(3, (-1, f)).permute(0, 2, 3, 1, 4)
    v_pages = v.unflatten(1, (-1, f)).permute(0, 3, 1, 4, 2)
    return tuple(t.clone(memory_format=torch.contiguous_format) for t in (k_pages, v_pages))
