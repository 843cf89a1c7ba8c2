"""Reference of linear: the weight's own bytes are the packed form, the product is float32 (float64 for float64)."""

import torch
from torch import Tensor

GROUP = 64
MOST = {"int16": (4095, 8191), "int8": (127, 32767)}  # largest integers of a weight and of x


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(wide) @ weight.to(wide).T
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def fixed_groups(x: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Integers `[rows, groups, 64]` (as float32) and scales `[rows, groups]`: x within half a scale, group by group."""
    x = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    top = x.abs().amax(-1)
    scales = torch.where(top < 1e-30, 0.0, top / most)
    up = torch.where(scales > 0, torch.full_like(top, most) / top, 0.0)  # a scalar's quotient would be rounded twice
    values = (x * up[..., None]).round()
    finite = x.isfinite().all(-1)
    return torch.where(finite[..., None], values, 0.0), torch.where(finite, scales, torch.nan)


def linear_fixed(x: Tensor, weight: Tensor, bias: Tensor | None, form: str) -> Tensor:
    """The product in fixed point: exact sums of 64, scaled and added up as float32."""
    most_weight, most_x = MOST[form]
    w, w_scales = fixed_groups(weight, most_weight)
    a, a_scales = fixed_groups(x, most_x)
    y = torch.zeros(len(x), len(weight))
    for g in range(w.shape[1]):
        exact = (a[:, g].double() @ w[:, g].double().T).float()
        y = torch.addcmul(y, exact * w_scales[:, g], a_scales[:, g, None])
    return (y if bias is None else y + bias.float()).to(x.dtype)
