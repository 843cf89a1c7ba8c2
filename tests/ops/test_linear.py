import os
import subprocess
import sys

import pytest
import torch
from budget import assert_within_budget, to_float64

from ttskernels import _dispatch
from ttskernels._reference import linear as reference
from ttskernels.ops.linear import FORMS, Rounded, gated_linear, linear, linear_pack, linear_parts

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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_outputs_are_those_of_few_rows(isa, dtype, form):
    """Written past the caches, and read by other threads at once."""
    x, weight, bias = make(1100, 512, 20, dtype)
    packed = linear_pack(weight, form=form, impl="cpu")
    few = torch.cat([linear(part, packed, bias) for part in x.split(50)])
    for _ in range(3):
        assert torch.equal(linear(x, packed, bias), few)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [257, 576])
def test_row_alone_equals_row_in_any_batch(isa, k, dtype, form):
    x, weight, bias = make(397, 150, k, dtype)
    packed, lib = linear_pack(weight, form=form, impl="cpu"), _dispatch.library()
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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [64, 576, 970])
def test_every_task_is_done_at_any_number_of_threads(cpu_extension, n, form):
    """Panels and blocks of rows are shared, taken a few at a time and from each other; 800 rows are three chunks."""
    x, weight, _ = make(800, n, 130, torch.bfloat16)
    packed, lib = linear_pack(weight, form=form, impl="cpu"), _dispatch.library()
    exact = linear(x, packed)  # bits that the test above compares with rows alone
    before = lib.ttsk_num_threads()
    try:
        for threads in (1, 2, 3, 4, 7, 16):
            lib.ttsk_set_num_threads(threads)
            for rows in (2, 9, 25, 64, 96, 200, 385, 800):
                assert torch.equal(linear(x[:rows], packed), exact[:rows]), f"{threads} threads, {rows} rows"
    finally:
        lib.ttsk_set_num_threads(before)


def test_bits_do_not_depend_on_the_size_of_the_cache(cpu_extension):
    """Blocks of a panel are as long as TTSK_L1_KB allows, which a process reads once: 705 pairs are 12 blocks, or 3."""
    code = (
        "import hashlib, torch; from ttskernels.ops.linear import linear, linear_pack; torch.manual_seed(0)\n"
        "packed = linear_pack(torch.randn(130, 1410, dtype=torch.bfloat16), impl='cpu')\n"
        "ys = [linear(torch.randn(rows, 1410, dtype=torch.bfloat16), packed) for rows in (1, 13, 20, 70)]\n"
        "print(torch.cat(ys).isfinite().all().item(), hashlib.sha256(torch.cat(ys).view(torch.uint8).numpy()).hexdigest())"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "TTSK_L1_KB": kb}, capture_output=True, text=True, check=True
        ).stdout
        for kb in ("32", "48", "")
    }
    assert len(seen) == 1 and seen.pop().startswith("True ")


FIXED_SHAPES = [(0, 64, 8), (1, 1, 1), (1, 64, 576), (3, 65, 17), (16, 130, 129), (61, 100, 300), (7, 66, 250), (401, 70, 65)]


def outliers(rows, k, dtype):
    """Rows as models have them: a few inputs a hundred times larger than the rest."""
    return (torch.randn(rows, k) * torch.randn(k).mul(1.5).exp()).to(dtype)


@pytest.mark.parametrize("form", ["int16", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, n, k", FIXED_SHAPES)
def test_fixed_point_equals_its_definition(isa, rows, n, k, dtype, form):
    _, weight, bias = make(rows, n, k, dtype, bias=n != 100)
    x = outliers(rows, k, dtype)
    expected = reference.linear_fixed(x, *reference.fixed_weight(weight, form), bias, form).float()
    got = linear(x, linear_pack(weight, form=form, impl="cpu"), bias).float()
    # Sums of groups are exact; what may differ is the rounding of a few float32 additions, and so of the result.
    scale = expected.abs().amax(1, keepdim=True) if rows else 1.0
    assert ((got - expected).abs() <= scale * (2e-6 + torch.finfo(dtype).eps)).all()


@pytest.mark.parametrize("rows, n, k", FIXED_SHAPES)
def test_weights_that_are_rounded_already(isa, rows, n, k):
    """Any integers and scales, multiplied as their definition says."""
    x, _, bias = make(rows, n, k, torch.bfloat16)
    size = reference.group_size(k, "int8")
    groups = -(-k // size)
    values = torch.randint(-127, 128, (n, groups * size), dtype=torch.int8)
    rounded = Rounded(values, torch.rand(n, groups) * 1e-3, k, torch.bfloat16)
    ours, theirs = (linear(x, linear_pack(rounded, form="int8", impl=impl), bias).float() for impl in ("cpu", "reference"))
    scale = theirs.abs().amax(1, keepdim=True) if rows else 1.0
    assert ((ours - theirs).abs() <= scale * (2e-6 + torch.finfo(torch.bfloat16).eps)).all()


def test_rounded_weights_of_the_wrong_shape_are_refused(cpu_extension):
    values, scales = torch.zeros(3, 320, dtype=torch.int8), torch.zeros(3, 5)
    Rounded(values, scales, 257, torch.float32)
    for wrong in ((values[:, :64], scales, 257), (values, scales[:2], 257), (values, scales, 256), (values.int(), scales, 257),
                  (values, scales.half(), 257)):  # fmt: skip
        with pytest.raises(ValueError, match="(values|scales) must be"):
            Rounded(*wrong, torch.float32)
    with pytest.raises(ValueError, match="form must be 'int8' for a weight that is rounded already"):
        linear_pack(Rounded(values, scales, 257, torch.float32))
    pack = torch.ops.ttskernels.linear_pack
    for wrong in ((values.int(), 2, scales), (values, 2, scales[:, :1].contiguous()), (values, 1, scales), (values.T, 2, scales)):
        with pytest.raises(RuntimeError, match="int8|scales|rows"):
            pack(*wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, n, k", FIXED_SHAPES[2:])
def test_int16_is_as_accurate_as_bf16_arithmetic(isa, rows, n, k, dtype):
    x, (_, weight, bias) = outliers(rows, k, dtype), make(rows, n, k, dtype)
    exact = reference.linear(*to_float64(x, weight, bias))
    low = torch.nn.functional.linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
    assert_within_budget(linear(x, linear_pack(weight, form="int16", impl="cpu"), bias), exact, low)


@pytest.mark.parametrize("most, size", [(4095, 64), (127, 64), (127, 128), (127, 192)])
def test_fixed_groups_are_within_half_a_scale(most, size):
    x = torch.randn(5, 150) * torch.tensor([1.0, 1e-3, 1e30, 0.0, 1e-38])[:, None]
    values, scales = reference.fixed_groups(x, most, size)
    assert values.abs().max() <= most and (values == values.round()).all()
    wide = (values * scales[..., None]).flatten(1)[:, :150]
    error = (wide - x).abs().nan_to_num(torch.inf)
    assert (error[:3] <= 0.5001 * scales[:3].repeat_interleave(size, 1)[:, :150]).all()
    assert (wide[3:] == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("form", ["int16", "int8"])
def test_what_is_not_finite_stays_visible(isa, form, bad):
    x, weight, _ = make(4, 70, 130, torch.float32)
    x[1, 129] = bad
    weight[65, 3] = bad
    y = linear(x, linear_pack(weight, form=form, impl="cpu"))
    expected = torch.zeros(4, 70, dtype=torch.bool)
    expected[1], expected[:, 65] = True, True
    assert torch.equal(y.isnan(), expected)


@pytest.mark.parametrize("sign", [1, -1])
def test_largest_products_fit(isa, sign):
    """A group of 64 of the largest integers on both sides, with one sign: the sum just fits in int32."""
    x, weight = torch.full((7, 64), 3.0), torch.full((64, 64), 2.0 * sign)
    y = linear(x, linear_pack(weight, form="int16", impl="cpu"))
    torch.testing.assert_close(y, torch.full((7, 64), 384.0 * sign), rtol=1e-6, atol=0)
    x[:, 1:] = weight[:, 1:] = 0  # one value becomes 64 equal ones
    y = linear(x, linear_pack(weight, form="int8", impl="cpu"))
    torch.testing.assert_close(y, torch.full((7, 64), 6.0 * sign), rtol=1e-6, atol=0)


@pytest.mark.parametrize("k, size", [(1, 64), (64, 64), (65, 128), (130, 192), (320, 64), (576, 192), (896, 128), (1536, 192)])
def test_turning_keeps_products_and_spreads_outliers(k, size):
    assert reference.group_size(k, "int8") == size and reference.group_size(k, "int16") == 64
    x, y = torch.randn(3, k), torch.randn(3, k)
    torch.testing.assert_close((reference.turn(x) * reference.turn(y)).sum(1) / reference.turned_by(k), (x * y).sum(1))
    units = -(-k // 64)
    turned = reference.turn(torch.eye(64 * units)).unflatten(1, (-1, size))
    signs = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(128)] for i in range(128)])
    if size < 192:
        assert torch.equal(turned[:size, 0], signs[:size, :size]) and (turned[:size, 1:] == 0).all()
    else:  # one value becomes 64 of two thirds in each of the others, and of a third where it was
        thirds = turned[:64, 0].unflatten(1, (3, 64)).abs()
        torch.testing.assert_close(thirds, torch.tensor([1.0, 2.0, 2.0])[:, None].expand(64, 3, 64) / 3)


@pytest.mark.parametrize("rows, n, k", FIXED_SHAPES[3:])
def test_int8_is_rounded_no_further_than_its_scales_say(isa, rows, n, k):
    """|error| <= sum over a group of |w| half a scale of x + |x| half a scale of w + a quarter of both, w and x turned."""
    x, (_, weight, bias) = outliers(rows, k, torch.float32), make(rows, n, k, torch.float32)
    exact = reference.linear(*to_float64(x, weight, bias))
    size = reference.group_size(k, "int8")
    wide = [reference.turn(t).double().abs().unflatten(1, (-1, size)) for t in (x, weight)]
    (a, a_scale), (w, w_scale) = ((t, t.amax(2) / 254) for t in wide)  # half of a scale; a weight's may be 7 % larger
    w_scale = w_scale * 127 / 123
    bound = torch.einsum("rg,ng->rn", a_scale, w.sum(2)) + torch.einsum("rg,ng->rn", a.sum(2), w_scale)
    bound = (bound + size * torch.einsum("rg,ng->rn", a_scale, w_scale)) / reference.turned_by(k)
    error = (linear(x, linear_pack(weight, form="int8", impl="cpu"), bias).double() - exact).abs()
    assert (error <= 1.001 * bound).all()
    assert (error.square().mean() / exact.square().mean()).sqrt() < 0.015


def test_int8_loses_less_than_without_the_rotation(cpu_extension):
    x, (_, weight, _) = outliers(64, 576, torch.float32), make(1, 200, 576, torch.float32)
    exact = x.double() @ weight.double().T
    plain = torch.zeros(64, 200, dtype=torch.float64)
    (a, a_scale), (w, w_scale) = reference.fixed_groups(x, 127, 64), reference.fixed_groups(weight, 127, 64)
    for g in range(9):
        plain += (a[:, g] * a_scale[:, g, None]).double() @ (w[:, g] * w_scale[:, g, None]).double().T
    ours = linear(x, linear_pack(weight, form="int8")).double()
    assert (ours - exact).norm() < 0.8 * (plain - exact).norm()


def test_strided_weight_and_x(cpu_extension):
    x, weight, _ = make(5, 16, 24, torch.float32)
    expected = x[:, ::2] @ weight[:, ::2].T
    torch.testing.assert_close(linear(x[:, ::2], linear_pack(weight[:, ::2])), expected)


def test_linear_opcheck(cpu_extension):
    x, weight, bias = make(3, 20, 9, torch.bfloat16)
    torch.library.opcheck(torch.ops.ttskernels.linear_pack.default, (weight,))
    packed = torch.ops.ttskernels.linear_pack(weight)
    torch.library.opcheck(torch.ops.ttskernels.linear.default, (x, packed, 20, bias.float()))
    for form in (1, 2):
        torch.library.opcheck(torch.ops.ttskernels.linear_pack.default, (weight, form))
        packed = torch.ops.ttskernels.linear_pack(weight, form)
        torch.library.opcheck(torch.ops.ttskernels.linear.default, (x, packed, 20, None, form))


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
    with pytest.raises(ValueError, match="form must be one of"):
        linear_pack(weight, form="int4")
    with pytest.raises(RuntimeError, match="form must be 0"):
        torch.ops.ttskernels.linear_pack(weight, 3)
    with pytest.raises(ValueError, match="device"):
        linear(x.to("meta"), packed)
    with pytest.raises(RuntimeError, match="packed must have"):
        torch.ops.ttskernels.linear(x, packed.data[:64], 8, None)


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 40])
def test_parts_add_up_to_the_product(parts):
    x, weight, _ = make(5, 9, 33, torch.float64, bias=False)
    made = linear_parts(x, weight, parts=parts)
    assert made.shape == (parts, 5, 9)
    torch.testing.assert_close(made.sum(0), torch.einsum("rk,nk->rn", x, weight))
    low = linear_parts(x.bfloat16(), weight.bfloat16(), parts=parts)
    assert low.dtype == torch.float32  # not rounded to the inputs' dtype
    torch.testing.assert_close(low.sum(0), x.bfloat16().float() @ weight.bfloat16().float().T)


def test_gated_linear_against_torch():
    x, weight, _ = make(5, 18, 33, torch.float64, bias=False)
    expected = torch.nn.functional.silu(x @ weight[:9].T) * (x @ weight[9:].T)
    torch.testing.assert_close(gated_linear(x, weight), expected)


def test_parts_and_gated_invalid():
    x, weight, _ = make(2, 9, 8, torch.float32, bias=False)
    with pytest.raises(ValueError, match=r"weight must be \[outputs, inputs\]"):
        linear_parts(x, weight[:, :4])
    with pytest.raises(ValueError, match=r"weight must be \[2 \* outputs, inputs\]"):
        gated_linear(x, weight)
    with pytest.raises(ValueError, match="weight must have x's floating dtype"):
        linear_parts(x, weight.half())
    with pytest.raises(ValueError, match="parts must be at least 1, got 0"):
        linear_parts(x, weight, parts=0)
