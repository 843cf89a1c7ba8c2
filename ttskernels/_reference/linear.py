"""Reference of linear: the weight's own bytes are the packed form, the product is float32 (float64 for float64)."""

import torch
from torch import Tensor

UNIT = 64
MOST = {"int16": (4095, 8191), "int8": (127, 127)}  # largest integers of a weight and of x
BYTE_TRIES = 8


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(wide) @ weight.to(wide).T
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def linear_parts(x: Tensor, weight: Tensor, parts: int) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    share = -(-x.shape[1] // parts)
    shares = zip(x.to(wide).split(share, 1), weight.to(wide).split(share, 1), strict=True)
    made = torch.zeros(parts, len(x), len(weight), dtype=wide, device=x.device)
    for part, (some_x, some_weight) in zip(made, shares, strict=False):
        torch.mm(some_x, some_weight.T, out=part)
    return made


def gated_linear(x: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = linear_parts(x, gate_up, 1)[0].chunk(2, 1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


def group_size(in_features: int, form: str) -> int:
    """How many inputs share a scale: 64, and for int8 two or three times as many where whole groups come out."""
    units = -(-in_features // UNIT)
    return UNIT * (1 if form != "int8" else 3 if units % 3 == 0 else 2 if units % 2 == 0 else 1)


def fixed_groups(x: Tensor, most: int, size: int, tries: int = 1) -> tuple[Tensor, Tensor]:
    """Integers `[rows, groups, size]` (as float32) and scales `[rows, groups]`: x within half a scale, group by group. The
    largest value becomes `most`, or of `tries` numbers from there down, half a unit apart, the one that rounds best."""
    x = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % size)).unflatten(1, (-1, size))
    scales, up = group_scales(x, most, tries)
    return (x * up[..., None]).round().nan_to_num(0.0, 0.0, 0.0), scales


def group_scales(x: Tensor, most: int, tries: int) -> tuple[Tensor, Tensor]:
    """Of groups `[..., size]`: their scales, and what rounds them when multiplied with it; 0 for groups of next to nothing, NaN
    and 0 for one that is not finite."""
    finite = x.isfinite().all(-1)
    top = torch.where(finite, x.abs().amax(-1), 0.0)
    scaled, least = top >= 1e-30, torch.full_like(top, torch.inf)
    scales, ups = torch.zeros_like(top), torch.zeros_like(top)
    for t in range(tries):
        largest = torch.full_like(top, most - t / 2)  # a scalar's quotient would be rounded twice
        scale, up = top / largest, largest / top
        error = (x - (x * up[..., None]).round() * scale[..., None]).square().sum(-1)
        better = scaled & (error < 0.999 * least) if t else scaled
        scales, ups = torch.where(better, scale, scales), torch.where(better, up, ups)
        least = torch.where(better, error, least)
    return torch.where(finite, scales, torch.nan), ups


def turn(x: Tensor) -> Tensor:
    """Every group of int8 as it is rounded: products of two become `turned_by` times as large. A Hadamard transform of each
    64, then, of two of them, another; of three, two thirds of their sum from each, which is a reflection."""
    size = group_size(x.shape[1], "int8")
    x = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % UNIT))
    for step in (1, 2, 4, 8, 16, 32) + (64,) * (size == 2 * UNIT):
        a, b = x.unflatten(1, (-1, 2, step)).unbind(2)
        x = torch.stack((a + b, a - b), 2).flatten(1)
    if size == 3 * UNIT:
        a, b, c = x.unflatten(1, (-1, 3, UNIT)).unbind(2)
        most = (a + b + c) * torch.tensor(2 / 3)
        x = torch.stack((a - most, b - most, c - most), 2).flatten(1)
    return x


def turned_by(in_features: int) -> int:
    return 2 * UNIT if group_size(in_features, "int8") == 2 * UNIT else UNIT


def fixed_weight(weight: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """Integers `[n, groups * size]` (as float32) and scales `[n, groups]` of a weight; int8 is turned before."""
    turned, tries = (turn(weight), BYTE_TRIES) if form == "int8" else (weight, 1)
    values, scales = fixed_groups(turned, MOST[form][0], group_size(weight.shape[1], form), tries)
    return values.flatten(1), scales


def linear_fixed(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None, form: str) -> Tensor:
    """The product in fixed point: exact sums of groups, scaled and added up as float32. For int8 x is turned as the weight is."""
    size = group_size(x.shape[1], form)
    a, a_scales = fixed_groups(turn(x) if form == "int8" else x, MOST[form][1], size)
    w, w_scales = values.unflatten(1, (-1, size)), scales / turned_by(x.shape[1]) if form == "int8" else scales
    y = torch.zeros(len(x), len(values))
    for g in range(w.shape[1]):
        exact = (a[:, g].double() @ w[:, g].double().T).float()
        y = torch.addcmul(y, exact * w_scales[:, g], a_scales[:, g, None])
    return (y if bias is None else y + bias.float()).to(x.dtype)
