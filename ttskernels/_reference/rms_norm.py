"""Reference of rms_norm: float32 (float64 for float64 input) arithmetic, result in x's dtype."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double() if x.dtype == torch.float64 else x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.to(wide.dtype)).to(x.dtype)


def add_rms_norm(parts: Tensor, x: Tensor, bias: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    total = parts.to(torch.promote_types(x.dtype, torch.float32)).sum(0)
    x.copy_((total if bias is None else total + bias) + x)
    return rms_norm(x, weight, eps)
