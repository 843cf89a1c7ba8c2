import pytest
import torch
from budget import assert_within_budget, to_float64

from ttskernels._reference import silu_mul as reference
from ttskernels.ops.silu_mul import silu_mul


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows, dim", [(0, 8), (1, 1), (3, 17), (2, 1100)])
def test_silu_mul(impl, dtype, rows, dim):
    both = torch.randn(rows, 2 * dim).mul(3).to(dtype)
    gate, up = both.chunk(2, dim=1)
    exact, low = reference.silu_mul(*to_float64(gate, up)), torch.nn.functional.silu(gate) * up
    assert_within_budget(silu_mul(gate, up, impl=impl), exact, low)


def test_large_gates_stay_finite():
    gate = torch.tensor([[-200.0, 200.0, 0.0]])
    assert silu_mul(gate, torch.ones(1, 3), impl="triton").tolist() == [[-0.0, 200.0, 0.0]]


def test_silu_mul_invalid():
    with pytest.raises(ValueError, match=r"gate and up must both be \[rows, dim\]"):
        silu_mul(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="must have one floating dtype"):
        silu_mul(torch.ones(2, 3), torch.ones(2, 3).half())
