"""How far a fast path may be from the exact result: twice the low-precision reference's own error, plus rounding."""

import torch
from torch import Tensor

ROUNDING = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def assert_within_budget(actual: Tensor, exact: Tensor, low: Tensor, factor: float = 2.0) -> None:
    """`exact`: float64 reference; `low`: the same reference (or PyTorch) in `actual`'s dtype."""
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert torch.equal(actual.isinf(), exact.isinf()) and not actual.isnan().any(), "non-finite values differ"
    finite = exact.isfinite()
    if not finite.any():
        return
    error = (actual.double() - exact)[finite].abs().max().item()
    own = (low.double() - exact)[finite].abs().max().item()
    scale = exact[finite].abs().max().item()
    budget = factor * own + ROUNDING.get(actual.dtype, 2**-23) * scale
    assert error <= budget, f"max error {error:.3g} exceeds budget {budget:.3g} (low-precision reference: {own:.3g})"


def to_float64(*args):
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
