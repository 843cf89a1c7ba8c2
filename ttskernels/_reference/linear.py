"""Reference of linear: the weight's own bytes are the packed form, the product is float32 (float64 for float64)."""

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(wide) @ weight.to(wide).T
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)
