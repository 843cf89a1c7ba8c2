"""int8 weights rounded for the inputs they meet: GPTQ (Frantar et al. 2022, arXiv:2210.17323) after what spreads outliers.

Weights of a row are rounded one after the other, and what each lost is made up for by those that follow, as the inputs'
second moments say. Each group shares a scale, which is fixed before the first of them is rounded. Written as LDLQ (Chee et
al. 2023, arXiv:2307.13304), which gives the same integers and needs one Cholesky factor and no inverse.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ttskernels._reference.linear import BYTE_TRIES, MOST, UNIT, group_scales, group_size, turn, turned_by
from ttskernels.ops.linear import Rounded

DAMPING = 0.01  # of the mean second moment, added to each: the paper's
ROWS = 16384  # rounded at a time; a vocabulary head has ten times as many
MOST_WEIGHT = MOST["int8"][0]


def second_moments(x: Tensor) -> Tensor:
    """Sums over rows of the products of two inputs, after they were turned.

    Args:
        x: `[rows, in_features]`, a matrix's inputs.
    Returns:
        `[groups * size] * 2` float32.
    """
    turned = turn(x).div_(math.sqrt(turned_by(x.shape[1])))
    return turned.T @ turned


def round_weight(weight: Tensor, moments: Tensor) -> Rounded:
    """Round a weight so that its products with inputs of such `moments` change little.

    Args:
        weight: `[out_features, in_features]`, any floating dtype; not modified.
        moments: of its inputs, see `second_moments`.
    Raises:
        ValueError: moments of another size, or not finite.
    """
    feedback, size = _feedback(moments, -(-weight.shape[1] // UNIT) * UNIT), group_size(weight.shape[1], "int8")
    parts = [_round_rows(turn(rows), feedback, size) for rows in weight.split(ROWS)]
    values, scales = (torch.cat(part) for part in zip(*parts, strict=True))
    return Rounded(values, scales, weight.shape[1], weight.dtype)


def _feedback(moments: Tensor, size: int) -> Tensor:
    """`[size] * 2` float32, upper triangular with a diagonal of ones: column j says how much of the errors in the weights
    before it weight j makes up for. Moments are this times a diagonal matrix times its transpose."""
    if tuple(moments.shape) != (size, size) or not moments.isfinite().all():
        raise ValueError(f"moments must be finite [{size}, {size}], got {list(moments.shape)}; an input was not finite")
    damped = moments.to(torch.float64, copy=True)
    mean = damped.diagonal().mean()
    damped.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    upper = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)  # from the far end: damped = upper upper^T
    return (upper / upper.diagonal()).float()


def _round_rows(turned: Tensor, feedback: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Integers `[rows, groups * size]` int8 and scales `[rows, groups]` of turned weights."""
    weights = turned.T.contiguous()
    errors, scales = torch.zeros_like(weights), []
    values = torch.empty(weights.shape, dtype=torch.int8)
    for first in range(0, len(weights), size):
        end = first + size
        wanted = torch.addmm(weights[first:end], feedback[:first, first:end].T, errors[:first])
        scale, up = group_scales(wanted.T, MOST_WEIGHT, BYTE_TRIES)
        scales.append(scale)
        for i in range(first, end):
            target = wanted[i - first]
            integer = (target * up).round().clamp(-MOST_WEIGHT, MOST_WEIGHT).nan_to_num(0.0)
            values[i] = integer.to(torch.int8)
            errors[i] = weights[i] - integer * scale
            wanted[i + 1 - first :].addr_(feedback[i, i + 1 : end], errors[i])
    return values.T.contiguous(), torch.stack(scales, 1)
