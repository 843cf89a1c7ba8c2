import pytest
import torch
from budget import assert_within_budget, to_float64

from ttskernels import _dispatch
from ttskernels._reference import linear as reference
from ttskernels.ops.linear import linear, linear_pack

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(rows, n, k, dtype, bias=True):
    weight = torch.randn(n, k, dtype=dtype)
    return torch.randn(rows, k, dtype=dtype), weight, torch.randn(n, dtype=dtype) if bias else None


def chain(x, weight, bias):
    """The product with one rounding per step over ascending k, the order the op promises."""
    y = torch.zeros(x.shape[0], weight.shape[0])
    for i in range(x.shape[1]):
        y = torch.addcmul(y, x[:, i : i + 1].float(), weight[:, i].float())
    return (y if bias is None else y + bias.float()).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows, n, k", [(0, 64, 8), (1, 1, 1), (1, 64, 576), (3, 65, 17), (16, 130, 129), (61, 100, 300), (401, 70, 33)]
)
def test_linear(isa, rows, n, k, dtype):
    x, weight, bias = make(rows, n, k, dtype, bias=n != 100)
    exact = reference.linear(*to_float64(x, weight, bias))
    low = chain(x, weight, bias)
    assert_within_budget(linear(x, linear_pack(weight, impl="cpu"), bias), exact, low)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [257, 576])
def test_row_alone_equals_row_in_any_batch(isa, k, dtype):
    x, weight, bias = make(397, 150, k, dtype)
    packed, lib = linear_pack(weight, impl="cpu"), _dispatch.library()
    threads = lib.ttsk_num_threads()
    try:
        lib.ttsk_set_num_threads(1)
        full = linear(x, packed, bias)
        lib.ttsk_set_num_threads(3)
        for rows in (1, 2, 5, 6, 7, 12, 13, 25, 64, 97, 397):
            assert torch.equal(linear(x[-rows:], packed, bias), full[-rows:]), f"{rows} rows"
        for r in (0, 95, 96, 383, 384):
            assert torch.equal(linear(x[r : r + 1], packed, bias), full[r : r + 1]), f"row {r}"
    finally:
        lib.ttsk_set_num_threads(threads)


def test_strided_weight_and_x(cpu_extension):
    x, weight, _ = make(5, 16, 24, torch.float32)
    expected = x[:, ::2] @ weight[:, ::2].T
    torch.testing.assert_close(linear(x[:, ::2], linear_pack(weight[:, ::2])), expected)


def test_linear_opcheck(cpu_extension):
    x, weight, bias = make(3, 20, 9, torch.bfloat16)
    torch.library.opcheck(torch.ops.ttskernels.linear_pack.default, (weight,))
    packed = torch.ops.ttskernels.linear_pack(weight)
    torch.library.opcheck(torch.ops.ttskernels.linear.default, (x, packed, 20, bias.float()))


def test_reference_against_torch():
    x, weight, bias = make(4, 7, 5, torch.float64)
    packed = linear_pack(weight, impl="reference")
    torch.testing.assert_close(linear(x, packed, bias), torch.nn.functional.linear(x, weight, bias))


def test_linear_invalid(cpu_extension):
    x, weight, bias = make(2, 8, 6, torch.float32)
    packed = linear_pack(weight)
    with pytest.raises(ValueError, match=r"x must be \[rows, 6\]"):
        linear(x[:, :5], packed)
    with pytest.raises(ValueError, match="packed weight's dtype"):
        linear(x.half(), packed)
    with pytest.raises(ValueError, match=r"bias must be \[8\]"):
        linear(x, packed, bias[:3])
    with pytest.raises(ValueError, match="both at least 1"):
        linear_pack(weight[:0])
    with pytest.raises(ValueError, match="pass impl='reference'"):
        linear_pack(weight.double(), impl="cpu")
    with pytest.raises(ValueError, match="device"):
        linear(x.to("meta"), packed)
    with pytest.raises(RuntimeError, match="packed must have"):
        torch.ops.ttskernels.linear(x, packed.data[:64], 8, None)
