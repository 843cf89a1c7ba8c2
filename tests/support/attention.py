"""Inputs of tree_attention over test forests, the exact result and PyTorch's own."""

import torch
from budget import to_float64

from ttskernels import layout
from ttskernels._reference import tree_attention as reference

# One deep shared prompt of more than one partial, forks, a split node that begins mid-page, odd lengths.
DEEP = [(-1, 1100, 0), (0, 37, 0), (0, 64, 11), (2, 530, 5), (2, 1, 0), (1, 16, 0)]
DEEP_ROWS = [(3, 529), (5, 15), (4, 0), (0, 1099), (3, 100), (1, 36), (0, 0)]


def make(trees, q_heads, kv_heads, head_dim, dtype, v_dim=None, packed=True, kv_dtype=None):
    """q and pools whose unused slots hold NaN."""
    torch.manual_seed(q_heads * 1000 + head_dim)
    v_dim = v_dim or head_dim
    q = torch.randn(len(trees.rows), q_heads, head_dim).to(dtype)
    k = torch.full((trees.num_pages, trees.page_size, kv_heads, head_dim), float("nan"))
    v = torch.full((trees.num_pages, trees.page_size, kv_heads, v_dim), float("nan"))
    page, slot = torch.tensor(sorted(trees.used_slots())).T
    k[page, slot] = torch.randn(len(page), kv_heads, head_dim)
    v[page, slot] = torch.randn(len(page), kv_heads, v_dim)
    k, v = k.to(kv_dtype or dtype), v.to(kv_dtype or dtype)
    return (q, *layout.from_nhd(k, v)) if packed else (q, k, v)


def expected(q, k, v, plan, scale, softcap, window, sinks, cache={}):  # noqa: B006 - the same at every level
    """Float64 reference, and PyTorch's result: SDPA with GEMM-like rows, where it has the feature."""
    bits = tuple(t.contiguous().view(torch.uint8).numpy().tobytes() for t in (q, plan))
    key = (bits, q.dtype, v.shape[3], scale, softcap, window, sinks is None)
    if key not in cache:
        if k.ndim == 5:
            k, v = layout.to_nhd(k, v)
        exact, exact_lse = reference.tree_attention(*to_float64(q, k, v), plan, scale, softcap, window, sinks)
        low, low_lse = reference.tree_attention(q, k, v, plan, scale, softcap, window, sinks)
        if not softcap and sinks is None:
            low = sdpa(q, k, v, plan, scale, window)
        cache[key] = exact, exact_lse, low, low_lse
    return cache[key]


def sdpa(q, k, v, plan, scale, window=0, copies=16):
    """A second formulation: torch's SDPA, row by row; copies of the query make it use GEMMs, not GEMVs."""
    out = q.new_zeros(*q.shape[:2], v.shape[3])
    for row, (keys, values) in enumerate(reference.visible_kv(q, k, v, plan, window)):
        if len(keys):
            out[row] = torch.nn.functional.scaled_dot_product_attention(
                q[row, :, None].expand(-1, copies, -1),
                keys.transpose(0, 1),
                values.transpose(0, 1),
                scale=scale,
                enable_gqa=True,
            )[:, 0]
    return out
