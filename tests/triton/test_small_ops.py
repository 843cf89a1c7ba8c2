"""The Triton kernels beside attention, each against its reference."""

import pytest
import torch
from budget import assert_within_budget, to_float64

from ttskernels._reference import linear as linear_reference
from ttskernels._reference import path_aggregate as path_reference
from ttskernels._reference import rms_norm as norm_reference
from ttskernels._reference import rope_append as rope_reference
from ttskernels._reference import step_score as score_reference
from ttskernels.ops.linear import gated_linear, linear_parts
from ttskernels.ops.path_aggregate import empty_state, path_aggregate
from ttskernels.ops.rms_norm import add_rms_norm, rms_norm
from ttskernels.ops.rope_append import rope_append
from ttskernels.ops.step_score import step_score

DTYPES = [torch.float32, torch.float16]


def to(device, *args):
    return [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, dim", [(0, 64), (1, 1), (3, 17), (5, 576)])
def test_rms_norm(device, dtype, rows, dim):
    x, weight = torch.randn(rows, 2 * dim, dtype=dtype)[:, :dim], torch.randn(dim, dtype=dtype)
    exact = norm_reference.rms_norm(*to_float64(x, weight), 1e-6)
    low = torch.nn.functional.rms_norm(x, (dim,), weight, 1e-6)
    assert_within_budget(rms_norm(*to(device, x, weight), 1e-6, impl="triton").cpu(), exact, low)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, dim, parts, bias", [(0, 64, 2, False), (1, 1, 1, True), (3, 17, 3, True), (5, 576, 12, False)])
def test_add_rms_norm(device, dtype, rows, dim, parts, bias):
    x, weight = torch.randn(rows, 2 * dim, dtype=dtype)[:, :dim], torch.randn(dim, dtype=dtype)
    added, b = torch.randn(parts, rows, dim), torch.randn(dim, dtype=dtype) if bias else None
    exact_x, low_x = x.double(), x.clone()
    exact = norm_reference.add_rms_norm(added.double(), exact_x, None if b is None else b.double(), weight.double(), 1e-6)
    low = norm_reference.add_rms_norm(added, low_x, b, weight, 1e-6)
    mine, added, weight, b = to(device, x, added, weight, b)
    normed = add_rms_norm(added, mine, weight, 1e-6, bias=b, impl="triton")
    assert_within_budget(mine.cpu(), exact_x, low_x)
    assert_within_budget(normed.cpu(), exact, low)


LINEAR_SIZES = [(0, 64, 64), (1, 5, 8), (3, 65, 24), (16, 130, 264), (61, 64, 200), (130, 70, 136), (3, 20, 17)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [None, 1, 2, 5])
@pytest.mark.parametrize("rows, outputs, inputs", LINEAR_SIZES)
def test_linear_parts(device, dtype, rows, outputs, inputs, parts):
    """The last size is one that boxes cannot read."""
    x, weight = torch.randn(rows, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
    exact = linear_reference.linear_parts(x.double(), weight.double(), 1)[0]
    low = linear_reference.linear_parts(x, weight, parts or 1).sum(0)
    made = linear_parts(*to(device, x, weight), parts=parts, impl="triton").cpu()
    assert made.dtype == torch.float32 and (parts is None or inputs % 8 or len(made) == parts)
    assert_within_budget(made.sum(0), exact, low)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, outputs, inputs", LINEAR_SIZES)
def test_gated_linear(device, dtype, rows, outputs, inputs):
    x, weight = torch.randn(rows, inputs, dtype=dtype), torch.randn(2 * outputs, inputs, dtype=dtype)
    exact, low = linear_reference.gated_linear(x.double(), weight.double()), linear_reference.gated_linear(x, weight)
    assert_within_budget(gated_linear(*to(device, x, weight), impl="triton").cpu(), exact, low)


def test_a_row_has_the_same_parts_in_any_batch(device):
    """Padding rows must not change what a branch computes."""
    x, weight = (t.to(device) for t in (torch.randn(61, 200), torch.randn(70, 200)))
    some = linear_parts(x[:9].clone(), weight, impl="triton")
    every = linear_parts(x, weight, impl="triton")
    if device.type == "cpu":  # the interpreter's products are the CPU's, whose sums depend on the shape
        torch.testing.assert_close(every[:, :9], some)
    else:
        assert torch.equal(every[:, :9], some)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("parts, bias", [(1, True), (3, False), (4, True)])
def test_rope_append_of_parts(device, parts, bias, norm):
    qkv, b = torch.randn(parts, 5, 6 * 48), torch.randn(6 * 48) if bias else None
    slots, place, inv_freq = torch.tensor([3, -1, 40, 0, 17]).int(), torch.randint(0, 900, (5,)).int(), torch.rand(20)
    norms = [torch.rand(48) + 0.5 for _ in range(2)] if norm else [None, None]
    pages = [torch.full((3, 16, 2, 48), float("nan")) for _ in range(2)]
    total = qkv.double().sum(0) + (0 if b is None else b.double())
    results = []
    for wide in (torch.float64, torch.float32):
        q, k, v = (t.unflatten(-1, (-1, 48)) for t in total.to(wide).split([2 * 48, 2 * 48, 2 * 48], -1))
        written = [t.to(wide) for t in pages]
        args = [t if t is None else t.to(wide) for t in norms]
        turned = rope_reference.rope_append(q, k, v, inv_freq, 1.0, place, slots, *args, 1e-6, *written)
        results.append([turned, *written])
    qkv, b, inv_freq, place, slots, *norms = to(device, qkv, b, inv_freq, place, slots, *norms)
    mine = to(device, *(t.clone() for t in pages))
    q, k, v = (t.unflatten(-1, (-1, 48)) for t in qkv.split([2 * 48, 2 * 48, 2 * 48], -1))
    options = dict(bias=b, q_norm=norms[0], k_norm=norms[1], impl="triton")
    for again in (False, True):  # parts of q, k and v in memory of their own
        for t in mine if again else ():
            t.fill_(float("nan"))
        turned = rope_append(*((t.contiguous() if again else t) for t in (q, k, v)), inv_freq, place, slots, *mine, **options)
        for actual, exact, low in zip([turned, *mine], *results, strict=True):
            actual, written = actual.cpu(), ~exact.isnan()
            assert torch.equal(actual.isnan(), ~written)
            assert_within_budget(actual[written], exact[written], low[written], factor=3.0)


@pytest.mark.parametrize("sizes", [[], [0], [3, 0, 17, 1]])
def test_path_aggregate(device, sizes):
    scores, indptr = torch.rand(sum(sizes)), torch.tensor([0, *sizes]).cumsum(0).int()
    scores[2::7] = 0.0
    state = empty_state(len(sizes))
    exact = path_reference.path_aggregate(state.double(), scores.double(), indptr)
    actual = path_aggregate(*to(device, state, scores, indptr), impl="triton").cpu()
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_a_path_with_a_score_that_is_no_number(device):
    """It stays so whatever follows, in every figure but the count and the last score; other paths do not notice."""
    scores, indptr = torch.tensor([0.5, float("nan"), 0.25, 0.75, 0.5]), torch.tensor([0, 3, 5]).int()
    state = empty_state(2)
    exact = path_reference.path_aggregate(state, scores, indptr)
    assert exact[0].isnan().tolist() == [False, True, False, True, True] and exact[1].isfinite().all()
    actual = path_aggregate(*to(device, state, scores, indptr), impl="triton").cpu()
    torch.testing.assert_close(actual, exact, equal_nan=True)


@pytest.mark.parametrize("dtype, from_float32", [(torch.float32, True), (torch.float16, False), (torch.float16, True)])
@pytest.mark.parametrize(
    "rows, q_heads, kv_heads, head_dim, v_dim, pairs, norm",
    [(0, 2, 1, 64, 64, 32, False), (5, 3, 1, 64, 64, 32, False), (6, 4, 2, 80, 48, 40, True), (5, 2, 1, 96, 96, 20, True)],
)
def test_rope_append(device, dtype, from_float32, rows, q_heads, kv_heads, head_dim, v_dim, pairs, norm):
    in_dtype = torch.float32 if from_float32 else dtype
    q, k = (torch.randn(rows, h, head_dim).to(in_dtype) for h in (q_heads, kv_heads))
    v = torch.randn(rows, kv_heads, v_dim).to(in_dtype)
    inv_freq, positions = 10000.0 ** -(torch.arange(pairs) / pairs), torch.randint(0, 5000, (rows,), dtype=torch.int32)
    slots = torch.randperm(48)[:rows].int()
    slots[4:] = -1
    norms = [torch.rand(head_dim).to(dtype) + 0.5 for _ in range(2)] if norm else [None, None]
    pages = [torch.full((3, 16, kv_heads, d), float("nan"), dtype=dtype) for d in (head_dim, v_dim)]
    results = []
    for wide in (torch.float64, None):
        args = [t if t is None or wide is None else t.to(wide) for t in (q, k, v, *norms, *pages)]
        out_pages = [t.clone() for t in args[5:]]
        turned = rope_reference.rope_append(
            *args[:3], inv_freq, 1.25, positions, slots, *args[3:5], 1e-6, *out_pages
        )
        results.append((turned, *out_pages))
    out_pages = to(device, *(t.clone() for t in pages))
    q_norm, k_norm = to(device, *norms)
    turned = rope_append(
        *to(device, q, k, v, inv_freq, positions, slots), *out_pages,
        rope_scale=1.25, q_norm=q_norm, k_norm=k_norm, impl="triton",
    )  # fmt: skip
    for actual, exact, low in zip((turned, *out_pages), *results, strict=True):
        actual = actual.cpu()
        written = ~exact.isnan()
        assert torch.equal(actual.isnan(), ~written)
        assert_within_budget(actual[written], exact[written], low[written], factor=3.0)


FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def write_float8(device, dtype, k, v, pairs, **options):
    """What rows `[n, heads, dim]` leave in pages of one slot a row, in float32; `pairs` are turned, by 0."""
    n, heads, dim = k.shape
    pages = [torch.zeros(1, n, heads, dim, device=device).to(dtype) for _ in range(2)]
    place, q = torch.arange(n).int(), torch.randn(n, 2 * heads, dim)
    args = to(device, q, k, v, torch.zeros(pairs), place, place)
    turned = rope_append(*args, *pages, impl="triton", **options)
    assert torch.equal(turned.cpu(), q)
    return [page[0].cpu().float() for page in pages]


@pytest.mark.parametrize("dtype", FLOAT8)
def test_rope_append_to_float8(device, float8, dtype):
    """The nearest float8 of every element, over the head's factor."""
    scales = torch.tensor([0.5, 2.0]), torch.tensor([0.25, 1.0])
    given = torch.randn(33, 2, 32), torch.randn(33, 2, 32)
    written = write_float8(device, dtype, *given, 16, k_scale=scales[0].to(device), v_scale=scales[1].to(device))
    for got, values, scale in zip(written, given, scales, strict=True):
        assert torch.equal(got, (values / scale[:, None]).to(dtype).float())


@pytest.mark.parametrize("dtype", FLOAT8)
def test_what_float8_cannot_hold(device, float8, dtype):
    """Too large: the largest one. Not finite: NaN, so that it is noticed."""
    most, inf = torch.finfo(dtype).max, float("inf")
    values = [1.01, -1.01, 1.9, -70, 1e30, -1e30, 1, -1, 0.25, 0, inf, -inf, float("nan"), 1, -1, 0.5]
    row = most * torch.tensor(values)
    want = row.clamp(-most, most).where(row.isfinite(), float("nan"))
    row = row.view(1, 1, 16)
    for got in write_float8(device, dtype, row, row, 0):
        torch.testing.assert_close(got.view(16), want, rtol=0, atol=0, equal_nan=True)
    large = torch.full((1, 1, 16), 0.6 * most)
    factors = [torch.tensor([0.5], device=device)] * 2
    for got in write_float8(device, dtype, large, -large, 4, k_scale=factors[0], v_scale=factors[1]):
        assert (got.abs() == most).all()  # turned halves and the rest


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rope_append_gives_q_in_a_dtype_of_choice(device, dtype):
    """Float32 parts over float8 pages, as a decoder of 16 bits has them."""
    qkv = torch.randn(3, 4, 4 * 32)
    q, k, v = (t.unflatten(-1, (-1, 32)) for t in qkv.split([2 * 32, 32, 32], -1))
    pages = [torch.zeros(1, 4, 1, 32, device=device).to(FLOAT8[0]) for _ in range(2)]
    place = torch.arange(4).int()
    args = to(device, q, k, v, torch.zeros(16), place, place)
    assert rope_append(*args, *pages, impl="triton").dtype == torch.float32
    turned = rope_append(*args, *pages, impl="triton", out_dtype=dtype)
    assert turned.dtype == dtype
    torch.testing.assert_close(turned.cpu().float(), q.sum(0), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("squash", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize(
    "n, dim, labels, inner, norm, bias",
    [(0, 64, 2, 0, True, True), (1, 1, 1, 0, False, False), (5, 100, 3, 0, True, True), (18, 96, 2, 40, True, True),
     (3, 70, 1, 17, False, False)],
)  # fmt: skip
def test_step_score(device, dtype, squash, n, dim, labels, inner, norm, bias):
    hidden, rows = torch.randn(20, 2 * dim).to(dtype)[:, :dim], torch.randint(20, (n,), dtype=torch.int32)
    heads = {
        "norm_weight": (1 + torch.randn(dim) / 8).to(dtype) if norm else None,
        "inner_weight": (torch.randn(inner, dim) / dim**0.5).to(dtype) if inner else None,
        "inner_bias": torch.randn(inner) / 4 if inner and bias else None,
        "weight": (torch.randn(labels, inner or dim) / 4).to(dtype),
        "bias": torch.randn(labels).to(dtype) if bias else None,
        "mix": torch.randn(labels) if labels > 1 else None,
    }
    names = ("inner_weight", "inner_bias", "weight", "bias")

    def reference(values, x):
        return score_reference.step_score(
            x, rows, values["norm_weight"], 1e-6, *(values[n] for n in names), squash, values["mix"]
        )

    exact = reference({k: None if v is None else v.double() for k, v in heads.items()}, hidden.double())
    plain = [None if t is None else t.to(dtype) for t in (heads["inner_weight"], heads["inner_bias"])]
    x = hidden[rows.long()]  # what PyTorch computes in this dtype: the inner layer takes normed rows rounded to it
    x = x if not norm else torch.nn.functional.rms_norm(x, (dim,), heads["norm_weight"], 1e-6)
    if inner:
        x = torch.nn.functional.linear(x, *plain).relu()
    low = score_reference.step_score(
        x, torch.arange(n), None, 1e-6, None, None, heads["weight"], heads["bias"], squash, heads["mix"]
    )
    given = {k: v if v is None else v.to(device) for k, v in heads.items()}
    scores = step_score(*to(device, hidden, rows), squash=squash, impl="triton", **given).cpu()
    assert_within_budget(scores, exact, low, factor=4)


@pytest.mark.parametrize("mix", [(1.0, 1.0), (0.0, 1.0, 1.0), (1.0, 0.5, 1.0, 1.0, 1.0)])
def test_a_mix_within_one_gives_no_score_above_one(device, mix):
    hidden, weight = torch.randn(200, 8), torch.randn(len(mix), 8)
    bias = torch.tensor([0.0 if m == 1 else -20.0 for m in mix])  # near 1, where rounding would show
    rows = torch.arange(200, dtype=torch.int32)
    hidden, rows, weight, bias, mix = to(device, hidden, rows, weight, bias, torch.tensor(mix))
    scores = step_score(hidden, rows, weight, bias=bias, mix=mix, impl="triton")
    assert scores.min() > 0 and scores.max() == 1


def test_a_score_that_is_not_finite(device):
    hidden, weight = torch.ones(3, 8, device=device), torch.ones(1, 4, device=device)
    hidden[1, 3] = float("-inf")
    inner = torch.ones(4, 8, device=device)
    rows = torch.tensor([0, 1, 2], dtype=torch.int32, device=device)
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"hidden row 1 \(rows\[1\]\) has no finite score"):
            step_score(hidden, rows, weight, inner_weight=inner, squash="none", impl="triton")
    else:
        scores = step_score(hidden, rows, weight, inner_weight=inner, squash="none", impl="triton")
        assert scores.isnan().tolist() == [False, True, False]


def test_linear_parts_of_one_row_of_a_wider_tensor(device):
    """One row counts as contiguous, whatever its stride."""
    x, weight = torch.randn(1, 65, dtype=torch.float16)[:, :64], torch.randn(32, 64, dtype=torch.float16)
    exact, low = (linear_reference.linear_parts(*to_float64(x, weight), 1)[0], linear_reference.linear_parts(x, weight, 1)[0])
    assert x.is_contiguous() and x.stride(0) == 65
    assert_within_budget(linear_parts(*to(device, x, weight), impl="triton").sum(0).cpu(), exact, low)
