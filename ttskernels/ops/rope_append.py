"""Rotary embedding of q and k, and the write of k, v into KV pages, in one pass."""

import torch
from torch import Tensor

from ttskernels._dispatch import Impl, resolve
from ttskernels._reference import rope_append as reference
from ttskernels.layout import PAGE_SIZE, fixed_run, is_fixed, pack_factor
from ttskernels.ops.tree_attention import FLOAT8


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
    bias: Tensor | None = None,
    rope_scale: float = 1.0,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Return q rotated by position; write k (rotated) and v into their slots.

    Element `i < len(inv_freq)` of a head pairs with `i + len(inv_freq)` (neox halves) and turns by
    `position * inv_freq[i]`; elements from `2 * len(inv_freq)` on are kept (partial rotary). Float32 inside,
    rounded once.

    Args:
        q, k, v: `[rows, heads, dim]`, float32 or the pages' dtype (any, for int16 and int8 pages); rows may be strided.
            Or, in float32, `[parts, rows, heads, dim]`, to be added up (what `linear_parts` gives).
        inv_freq: float32, at most `head_dim / 2` of them.
        positions: `[rows]` int32.
        slots: `[rows]` int32, `page * page_size + slot`, distinct; -1 writes nothing.
        k_pages, v_pages: one layer's pool, packed or strided as in `tree_attention`; modified. In int16 or int8 pages each
            head of k (turned) and v becomes integers and a scale; one with a value that is not finite has scale NaN.
        bias: `[outputs]` of q, k and v, one after the other, added first.
        rope_scale: multiplies cos and sin (transformers' attention_scaling).
        q_norm, k_norm: `[head_dim]` weights of an RMS norm of each head before the rotation (Qwen3).
        k_scale, v_scale: `[kv_heads]` float32 factors of float8 pages: what is written is divided by them. Beyond the
            largest float8 it becomes that one; what is not finite becomes NaN.
        out_dtype: of the result. None: the pages' (`q`'s, if that is float8, int16 or int8), to which impl "cpu" and
            "reference" round in any case.
    Returns:
        `[rows, q_heads, head_dim]`.
    Raises:
        ValueError: shape or dtype mismatch.
        RuntimeError: a slot is outside of the pool (impl "cpu"); nothing is written then.
    Source: Su et al. 2021, arXiv:2104.09864.
    """
    q, k, v = (t if t.ndim == 4 else t[None] for t in (q, k, v))
    check_parts(q, k, v, bias)
    check(q[0], k[0], v[0], inv_freq, positions, slots, k_pages, v_pages, q_norm, k_norm)
    if out_dtype is None:
        out_dtype = q.dtype if is_fixed(k_pages) or k_pages.dtype in FLOAT8 else k_pages.dtype
    turns, pages, chosen = (inv_freq, rope_scale, positions, slots), (eps, k_pages, v_pages), resolve(impl, q)
    if chosen == "triton":
        from ttskernels._triton.rope_append import rope_append as launch

        if k_pages.ndim != 4:
            raise ValueError("impl 'triton' needs 4-D k_pages and v_pages, got packed ones; pass layout.to_nhd(k, v)")
        if len(q) > 1 and len({t.stride(0) for t in (q, k, v)}) > 1:
            q, k, v = (t.sum(0, keepdim=True) for t in (q, k, v))
        q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
        return launch(q, k, v, bias, *turns, q_norm, k_norm, *pages, k_scale, v_scale, out_dtype)
    if k_pages.dtype in FLOAT8:
        raise ValueError(f"impl {chosen!r} writes no {k_pages.dtype} pages; they need impl='triton'")
    q, k, v = added(q, k, v, bias)
    if is_fixed(k_pages):
        q_norm, k_norm = (None if norm is None else norm.to(q.dtype) for norm in (q_norm, k_norm))
    if chosen == "cpu":
        q, k, v = (t if t.stride(2) == 1 and t.stride(1) == t.shape[2] else t.contiguous() for t in (q, k, v))
        return torch.ops.ttskernels.rope_append(q, k, v, *turns, q_norm, k_norm, *pages).to(out_dtype)
    return reference.rope_append(q, k, v, *turns, q_norm, k_norm, *pages).to(out_dtype)


def added(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> list[Tensor]:
    """The sums of parts; with a bias, float32 at least, as the result is rounded once."""
    made, first = [], 0
    for t in (q, k, v):
        total, heads = t.sum(0) if len(t) > 1 else t[0], t.shape[2:]
        if bias is not None:
            wide = torch.promote_types(total.dtype, torch.float32)
            total = total.to(wide) + bias[first : first + heads.numel()].view(heads).to(wide)
        made.append(total)
        first += heads.numel()
    return made


def check_parts(q, k, v, bias) -> None:
    parts, outputs = len(q), sum(t.shape[2:].numel() for t in (q, k, v))
    if not parts or len(k) != parts or len(v) != parts:
        raise ValueError(f"q, k and v must have the same number of parts, at least 1, got {parts}, {len(k)} and {len(v)}")
    if parts > 1 and q.dtype != torch.float32:
        raise ValueError(f"parts of q, k and v must be float32, got {q.dtype}; add them up first")
    if bias is not None and (bias.shape != (outputs,) or not bias.is_floating_point()):
        raise ValueError(f"bias must be floating [{outputs}], got {bias.dtype} {tuple(bias.shape)}")


def check(q, k, v, inv_freq, positions, slots, k_pages, v_pages, q_norm, k_norm) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if (
        q.ndim != 3
        or k.ndim != 3
        or v.ndim != 3
        or k.shape[:2] != v.shape[:2]
        or k.shape[::2] != q.shape[::2]
    ):
        raise ValueError(
            f"q, k and v must be [rows, heads, dim] with equal rows, kv heads and head_dim, got {shapes}"
        )
    dtype, rows, head_dim, v_dim = k_pages.dtype, *q.shape[::2], v.shape[2]
    fixed = is_fixed(k_pages)
    fits = q.dtype in (dtype, torch.float32) or dtype in FLOAT8 or fixed and q.is_floating_point()
    if not q.dtype == k.dtype == v.dtype or not fits or v_pages.dtype != dtype:
        raise ValueError(
            f"q, k and v must be float32 or the pages' dtype {dtype}, got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    f, heads = pack_factor(dtype), k.shape[1]
    want_k, want_v = (heads, head_dim // f, PAGE_SIZE, f), (heads, PAGE_SIZE // f, v_dim, f)
    if fixed:
        want_k, want_v = (heads, fixed_run(head_dim, dtype)), (heads, fixed_run(v_dim, dtype))
    elif k_pages.ndim == 4:
        want_k, want_v = (k_pages.shape[1], heads, head_dim), (k_pages.shape[1], heads, v_dim)
    if tuple(k_pages.shape[1:]) != want_k or tuple(v_pages.shape[1:]) != want_v:
        raise ValueError(
            f"for {shapes} the pages must be {('pages', *want_k)} and {('pages', *want_v)}, "
            f"got {tuple(k_pages.shape)} and {tuple(v_pages.shape)}"
        )
    if fixed and head_dim % 2:
        raise ValueError(f"head_dim must be even for {dtype} pages, got {head_dim}; pad the heads or use float pages")
    if k_pages.ndim != 4 and not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        raise ValueError("packed k_pages and v_pages must be contiguous; pass one layer's pool[layer]")
    if inv_freq.ndim != 1 or 2 * inv_freq.numel() > head_dim or inv_freq.dtype != torch.float32:
        raise ValueError(
            f"inv_freq must be float32 with at most head_dim / 2 = {head_dim // 2} elements, "
            f"got {inv_freq.dtype} {tuple(inv_freq.shape)}"
        )
    for name, t in (("positions", positions), ("slots", slots)):
        if t.dtype != torch.int32 or tuple(t.shape) != (rows,):
            raise ValueError(
                f"{name} must be int32 [{rows}], got {t.dtype} {tuple(t.shape)}; pass {name}.int()"
            )
    wanted = q.dtype if fixed else dtype
    for name, t in (("q_norm", q_norm), ("k_norm", k_norm)):
        if t is not None and (tuple(t.shape) != (head_dim,) or t.dtype != wanted and dtype not in FLOAT8):
            raise ValueError(f"{name} must be {wanted} [{head_dim}], got {t.dtype} {tuple(t.shape)}")
