import pytest
import torch
from budget import assert_within_budget, to_float64

from ttskernels._reference import rms_norm as reference
from ttskernels.ops.rms_norm import add_rms_norm, rms_norm


def make(rows, dim, dtype):
    return torch.randn(rows, dim, dtype=dtype), torch.randn(dim, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows, dim", [(0, 64), (1, 1), (1, 576), (3, 17), (61, 128)])
def test_rms_norm(isa, rows, dim, dtype):
    x, weight = make(rows, dim, dtype)
    exact = reference.rms_norm(*to_float64(x, weight), 1e-6)
    low = torch.nn.functional.rms_norm(x, (dim,), weight, 1e-6)
    assert_within_budget(rms_norm(x, weight, 1e-6, impl="cpu"), exact, low)


def test_reference_against_torch():
    x, weight = make(5, 33, torch.float64)
    expected = torch.nn.functional.rms_norm(x, (33,), weight, 1e-5)
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-5), expected)


def test_rms_norm_opcheck(cpu_extension):
    torch.library.opcheck(torch.ops.ttskernels.rms_norm.default, (*make(4, 32, torch.float32), 1e-6))


def test_rms_norm_invalid():
    x, weight = make(2, 8, torch.float32)
    with pytest.raises(ValueError, match=r"weight must be \[dim\]"):
        rms_norm(x, weight[:4])
    with pytest.raises(ValueError, match="pass weight.to"):
        rms_norm(x, weight.half())
    with pytest.raises(ValueError, match="impl must be one of"):
        rms_norm(x, weight, impl="fast")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts, bias", [(1, False), (3, True)])
def test_add_rms_norm(dtype, parts, bias):
    """x is the sum, rounded once, and the norm is of that."""
    x, weight = make(4, 33, dtype)
    added = torch.randn(parts, 4, 33, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    b = torch.randn(33, dtype=dtype) if bias else None
    total = (x.double() + added.double().sum(0) + (0 if b is None else b.double())).to(dtype)
    normed = add_rms_norm(added, x, weight, 1e-5, bias=b)
    torch.testing.assert_close(x, total)
    torch.testing.assert_close(normed, torch.nn.functional.rms_norm(x, (33,), weight, 1e-5))


def test_add_rms_norm_invalid():
    x, weight = make(2, 8, torch.float32)
    before = x.clone()
    for match, parts, options in (
        ("parts must be torch.float32", torch.zeros(1, 2, 8).half(), {}), ("at least 1, 2, 8", torch.zeros(0, 2, 8), {}),
        ("parts must be", torch.zeros(1, 3, 8), {}), ("bias must be floating", torch.zeros(1, 2, 8), {"bias": torch.zeros(7)}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            add_rms_norm(parts, x, weight, **options)
    with pytest.raises(ValueError, match="weight must be torch.float32"):
        add_rms_norm(torch.zeros(1, 2, 8), x, weight.half())
    assert torch.equal(x, before)
