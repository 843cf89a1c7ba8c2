"""Attention of query rows over their own paths through a forest of KV nodes."""

import torch
from torch import Tensor

from ttskernels._dispatch import Impl, resolve
from ttskernels._reference import tree_attention as reference
from ttskernels.layout import PAGE_SIZE, dim_of, fixed_run, is_fixed, pack_factor

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def tree_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    plan,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Dense attention of each row over its own path, reading every shared node once.

    Args:
        q: `[rows, q_heads, head_dim]`, fp32 / fp16 / bf16, caller's row order.
        k_pages, v_pages: one layer's pool in `q`'s dtype: packed (`ttskernels.layout`, 5-D) or an engine's
            `[pages, page_size, kv_heads, head_dim]` (4-D, any strides with the last 1; v_dim may differ). The latter
            also in float8_e4m3fn / float8_e5m2 (impl "triton", "reference"). impl "triton" takes no packed pools. Packed
            int16 or int8 pools (3-D) are in fixed point: impl "cpu" then rounds q and the weights of 64 tokens to
            int16, with a scale each, and sums products exactly.
        plan: a `Plan`, a `DevicePlan` or its int32 buffer, of as many rows. A bare buffer on a GPU costs a
            synchronisation.
        scale: of the scores, `head_dim ** -0.5` by default.
        softcap: if not 0, `softcap * tanh(score / softcap)`.
        window: if not 0, a row at position p sees positions `p - window + 1 .. p`.
        sinks: `[q_heads]` float32; `exp(sink)` joins the denominator (and lse) of rows that see a token.
        k_scale, v_scale: `[kv_heads]` float32, factors of float8 K and V, positive.
        return_lse: also return the natural log of the denominator, `[rows, q_heads]` float32.
        out: `[rows, q_heads, v_dim]` in `q`'s dtype, rows contiguous, not overlapping `q`; written and returned.
    Returns:
        `[rows, q_heads, v_dim]` in `q`'s dtype, or (that, lse). A row that sees nothing gives 0 and -inf. What unused slots
        hold never shows. On the CPU a row's bits depend on its path alone.
    Raises:
        ValueError: shape, dtype or head size mismatch, or a plan of other rows or another page size.
    """
    chosen, refused = resolve(impl, q), None
    if chosen == "cpu" and k_scale is None and v_scale is None:
        try:
            out, lse = _on_cpu(q, k_pages, v_pages, plan, scale, softcap, window, sinks, out)
            return (out, lse) if return_lse else out
        except Exception as error:  # the op checks what `check` does, in words of its own
            refused = error
    header = check(q, k_pages, v_pages, plan, softcap, window, sinks, k_scale, v_scale)
    plan = getattr(plan, "buffer", plan)
    if out is None:
        out = q.new_empty(q.shape[0], q.shape[1], dim_of(v_pages))
    check_out(out, q, dim_of(v_pages))
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if k_pages.dtype in FLOAT8 and chosen == "cpu":
        if impl == "cpu":
            raise ValueError(f"impl 'cpu' has no {k_pages.dtype} pools; pass impl='reference' or q's dtype {q.dtype}")
        chosen = "reference"
    if chosen == "cpu":
        raise refused
    if chosen == "triton":
        from ttskernels._triton.tree_attention import tree_attention as launch

        if k_pages.ndim != 4:
            raise ValueError("impl 'triton' needs 4-D k_pages and v_pages, got packed ones; pass layout.to_nhd(k, v)")
        q = q if q.stride(2) == 1 else q.contiguous()
        lse = launch(q, k_pages, v_pages, plan, header, scale, softcap, window, sinks, k_scale, v_scale, out)
    else:
        args = (plan, scale, softcap, window, sinks, k_scale, v_scale)
        result, lse = reference.tree_attention(q, k_pages, v_pages, *args)
        out.copy_(result)
    return (out, lse) if return_lse else out


def _on_cpu(q, k, v, plan, scale, softcap, window, sinks, out):
    rows, heads, dim = q.shape  # each look at a tensor from Python takes a part of a microsecond
    if out is None:
        out = q.new_empty(rows, heads, dim_of(v))
    else:
        check_out(out, q, dim_of(v))
    if q.stride()[1:] != (dim, 1):
        q = q.contiguous()
    if sinks is not None:
        sinks = sinks.contiguous()
    plan, scale = getattr(plan, "buffer", plan), dim**-0.5 if scale is None else scale
    return out, torch.ops.ttskernels.tree_attention.default(q, k, v, plan, scale, softcap, window, sinks, out)


def check(
    q: Tensor, k: Tensor, v: Tensor, plan, softcap: float, window: int, sinks: Tensor | None, k_scale=None, v_scale=None
) -> list[int]:
    """Raise what `tree_attention` promises to; returns the plan's header."""
    if q.ndim != 3:
        raise ValueError(f"q must be [rows, q_heads, head_dim], got shape {tuple(q.shape)}")
    fixed = is_fixed(k)
    if k.dtype != v.dtype or not fixed and k.dtype not in (q.dtype, *FLOAT8):
        raise ValueError(
            f"k_pages and v_pages must have q's dtype {q.dtype}, or both int16 or int8, got {k.dtype} and {v.dtype}"
        )
    if fixed and not k.ndim == v.ndim == 3:
        raise ValueError(
            f"int16 and int8 k_pages and v_pages must be 3-D (PagePool(form=...)), got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if not fixed and (k.ndim not in (4, 5) or v.ndim != k.ndim):
        raise ValueError(
            "k_pages and v_pages must both be packed (5-D) or [pages, page_size, kv_heads, dim] (4-D), "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    head_dim, v_dim = q.shape[2], dim_of(v)
    if fixed:
        kv_heads, page_size = k.shape[1], PAGE_SIZE
        want_k, want_v = ((k.shape[0], kv_heads, fixed_run(dim, k.dtype)) for dim in (head_dim, v_dim))
    elif k.ndim == 5:
        f = pack_factor(q.dtype)
        kv_heads, page_size = k.shape[1], PAGE_SIZE
        want_k = (k.shape[0], kv_heads, head_dim // f, PAGE_SIZE, f)
        want_v = (k.shape[0], kv_heads, PAGE_SIZE // f, v_dim, f)
    else:
        kv_heads, page_size = k.shape[2], k.shape[1]
        want_k, want_v = (*k.shape[:3], head_dim), (*k.shape[:3], v_dim)
    if tuple(k.shape) != want_k or tuple(v.shape) != want_v:
        raise ValueError(
            f"for q {tuple(q.shape)} k_pages and v_pages must be {want_k} and {want_v}, "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if kv_heads == 0 or q.shape[1] % kv_heads:
        raise ValueError(f"q_heads must be a multiple of kv_heads, got {q.shape[1]} and {kv_heads}")
    if head_dim % 16 or v_dim % 16 or not 0 < head_dim <= 256 or not 0 < v_dim <= 256:
        raise ValueError(
            f"head_dim and v_dim must be multiples of 16 up to 256, got {head_dim} and {v_dim}; pad them"
        )
    if k.ndim == 4 and (k.stride(3) != 1 or v.stride(3) != 1):
        raise ValueError(
            f"the last stride of k_pages and v_pages must be 1, got {k.stride(3)} and {v.stride(3)}"
        )
    if k.ndim != 4 and not (k.is_contiguous() and v.is_contiguous()):
        raise ValueError("packed k_pages and v_pages must be contiguous; pass one layer's pool[layer]")
    buffer = getattr(plan, "buffer", plan)
    if not isinstance(buffer, Tensor) or buffer.dtype != torch.int32 or buffer.ndim != 1 or buffer.numel() < 32:
        raise ValueError(
            f"plan must be a Plan or its int32 buffer, got {describe(plan)}; make one with build_plan"
        )
    if buffer.device != q.device:
        raise ValueError(f"plan must be on q's device {q.device}, got {buffer.device}; pass plan.to(q.device)")
    header = getattr(plan, "header", None) or buffer[:32].tolist()
    plan_page, rows = header[3:5]
    if rows != q.shape[0]:
        raise ValueError(
            f"plan has {rows} rows, q has {q.shape[0]}; build the plan for the rows of this call"
        )
    if plan_page != page_size:
        raise ValueError(f"plan was built for pages of {plan_page} tokens, k_pages has pages of {page_size}")
    if softcap < 0 or window < 0:
        raise ValueError(f"softcap and window must be 0 (off) or positive, got {softcap} and {window}")
    if sinks is not None and (tuple(sinks.shape) != (q.shape[1],) or sinks.dtype != torch.float32):
        raise ValueError(f"sinks must be float32 [{q.shape[1]}], got {sinks.dtype} {tuple(sinks.shape)}")
    for name, t in (("k_scale", k_scale), ("v_scale", v_scale)):
        if t is not None and (tuple(t.shape) != (kv_heads,) or t.dtype != torch.float32 or k.dtype not in FLOAT8):
            raise ValueError(f"{name} must be float32 [{kv_heads}], for float8 pools, got {describe(t)} and {k.dtype}")
    return header


def check_out(out: Tensor, q: Tensor, v_dim: int) -> None:
    want = (q.shape[0], q.shape[1], v_dim)
    if tuple(out.shape) != want or out.dtype != q.dtype or out.device != q.device:
        raise ValueError(f"out must be {q.dtype} {want} on {q.device}, got {describe(out)} on {out.device}")
    if out.numel() and (out.stride(2) != 1 or out.shape[1] > 1 and out.stride(1) != v_dim):
        raise ValueError(f"each row of out must be contiguous, got strides {out.stride()}")
    if out.numel() and out.untyped_storage().data_ptr() == q.untyped_storage().data_ptr():
        raise ValueError("out must not share memory with q, which other workers still read; pass a new tensor")


def describe(value) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
