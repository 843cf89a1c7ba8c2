"""Root-mean-square norm of rows, alone or behind a residual sum."""

import torch
from torch import Tensor

from ttskernels._dispatch import Impl, resolve
from ttskernels._reference import rms_norm as reference


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, impl: Impl = "auto") -> Tensor:
    """`x / sqrt(mean(x ** 2) + eps) * weight` per row, float32 inside, rounded once at the end.

    Args:
        x: `[rows, dim]`, fp32 / fp16 / bf16; not modified.
        weight: `[dim]`, dtype of `x`.
    Raises:
        ValueError: shape or dtype mismatch.
    Source: Zhang & Sennrich 2019, arXiv:1910.07467.
    """
    if x.ndim != 2 or weight.shape != x.shape[1:]:
        raise ValueError(f"weight must be [dim] of x [rows, dim], got weight {tuple(weight.shape)}, x {tuple(x.shape)}")
    if weight.dtype != x.dtype:
        raise ValueError(f"weight must have x's dtype {x.dtype}, got {weight.dtype}; pass weight.to(x.dtype)")
    chosen = resolve(impl, x)
    if chosen == "triton":
        from ttskernels._triton.rms_norm import rms_norm as launch

        return launch(x if x.stride(1) == 1 else x.contiguous(), weight.contiguous(), eps)
    if chosen == "cpu":
        return torch.ops.ttskernels.rms_norm(x.contiguous(), weight.contiguous(), eps)
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(
    parts: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-6, *, bias: Tensor | None = None, impl: Impl = "auto"
) -> Tensor:
    """`x += sum(parts) + bias`, rounded once; returns the RMS norm of what x is then.

    Args:
        parts: `[parts, rows, dim]` float32 (what `linear_parts` gives), added up in order; float64 if x is.
        x: `[rows, dim]`, modified; rows may be strided.
        weight: `[dim]`, dtype of `x`.
        bias: `[dim]`, any floating dtype.
    Returns:
        `[rows, dim]`, dtype of `x`.
    Raises:
        ValueError: shape, dtype or device mismatch; x is not modified then.
    """
    if x.ndim != 2 or weight.shape != x.shape[1:] or weight.dtype != x.dtype:
        got = f"weight {weight.dtype} {tuple(weight.shape)}, x {tuple(x.shape)}"
        raise ValueError(f"weight must be {x.dtype} [dim] of x [rows, dim], got {got}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if parts.ndim != 3 or parts.shape[1:] != x.shape or not len(parts) or parts.dtype != wide:
        raise ValueError(f"parts must be {wide} [at least 1, {x.shape[0]}, {x.shape[1]}], got {parts.dtype} {tuple(parts.shape)}")
    if bias is not None and (bias.shape != x.shape[1:] or not bias.is_floating_point()):
        raise ValueError(f"bias must be floating [{x.shape[1]}], got {bias.dtype} {tuple(bias.shape)}")
    if len({t.device for t in (parts, x, weight, x if bias is None else bias)}) > 1:
        raise ValueError(f"parts, weight and bias must be on x's device {x.device}")
    if resolve(impl, x) != "triton":
        return reference.add_rms_norm(parts, x, bias, weight, eps)
    if x.stride(1) != 1:
        raise ValueError(f"x must have last stride 1 for impl 'triton', got strides {x.stride()}")
    from ttskernels._triton.rms_norm import add_rms_norm as launch

    return launch(parts.contiguous(), x, bias, weight.contiguous(), eps)
