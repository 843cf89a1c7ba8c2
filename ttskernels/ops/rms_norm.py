"""Root-mean-square norm of rows."""

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
