"""Inputs of tree_attention over test forests, the exact result, PyTorch's own, and what fixed-point pages may add to it."""

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
    bits = tuple(t.contiguous().view(torch.uint8).numpy().tobytes() for t in (q, k, v, plan))
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


def make_fixed(trees, q_heads, kv_heads, head_dim, dtype, form, v_dim=None):
    """As `make`, with fixed-point pools: unused slots hold the smallest integers, and NaN scales."""
    q, k, v = make(trees, q_heads, kv_heads, head_dim, dtype, v_dim, packed=False, kv_dtype=torch.float32)
    return q, *fixed_pools(trees, k, v, form)


def fixed_pools(trees, k, v, form):
    """Pools of float32 NHD tensors, whose unused slots are NaN."""
    pools = layout.from_nhd_fixed(k, v, layout.FIXED[form])
    used = torch.zeros(trees.num_pages, 16, dtype=torch.bool)
    used[tuple(torch.tensor(sorted(trees.used_slots())).T)] = True
    page, slot = (~used).nonzero().T
    least = torch.iinfo(pools[0].dtype).min
    layout.fixed_parts(pools[0], keys=True)[0][page, slot] = least
    layout.fixed_parts(pools[1], keys=False)[0][page, slot // 2, slot % 2] = least
    return pools


def fixed_query(q, dtype):
    """q as the kernel rounds it over pages of this dtype, in float64: head_dim products with the largest K fit in int32."""
    most = min(2**15 - 1, (2**31 - 1) // (layout.MOST[dtype] * q.shape[2]))
    wide = q.float()
    top = wide.abs().amax(-1, keepdim=True)
    ints = (wide * torch.where(top > 0, torch.full_like(top, most) / top, 0.0)).round()
    return ints.double() * (top / most).double()


def fixed_bounds(q, k, v, plan, scale, softcap, window, sinks):
    """`[rows, q_heads, v_dim]` and `[rows, q_heads]`: how far out and lse may be from the exact result over these very pages and
    `fixed_query`.

    Scores are exact but for a few float32 operations; scores that move by d change every weight by a factor of at most e^2d. A
    rounded weight, times V's scale, is off by half a step, which is no larger than the row's largest one asks for; it meets
    V's integer.
    """
    dtype, exact = k.dtype, q.double()
    most_weight = 8191 if dtype == torch.int16 else 32767
    scales = layout.fixed_parts(v, keys=False)[1][..., None].expand(-1, -1, -1, 2)  # as values of two columns
    out = torch.zeros(*q.shape[:2], layout.dim_of(v), dtype=torch.float64)
    lse = torch.zeros(q.shape[:2], dtype=torch.float64)
    values = reference.visible_kv(exact, k, v, plan, window)
    keeps = reference.visible_kv(exact.float(), *(scales.contiguous(),) * 2, plan, window)
    for row, ((keys, vals), (_, v_scale)) in enumerate(zip(values, keeps, strict=True)):
        if not len(keys):
            continue
        group = q.shape[1] // keys.shape[1]
        keys, vals, v_scale = (t.double().repeat_interleave(group, dim=1) for t in (keys, vals, v_scale[..., 0]))
        scores = torch.einsum("hd,thd->ht", exact[row], keys) * scale
        moved = 2**-21 * scores.abs().amax(1)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
            moved = moved + 2**-20 * softcap
        if sinks is not None:
            scores = torch.cat([scores, sinks.double()[:, None]], 1)
        lse[row] = moved
        weights = scores.softmax(1)[:, : len(keys)]
        out[row] = torch.einsum("ht,thd->hd", weights, vals.abs()) * (torch.expm1(2 * moved) + 2**-20)[:, None]
        half = (weights * v_scale.T).amax(1) * torch.exp(2 * moved) / most_weight / 2
        whole = torch.where(v_scale[..., None] > 0, vals.abs() / v_scale[..., None], 0.0).sum(0)
        out[row] += half[:, None] * whole
    return out, lse + 2**-20
