"""The Triton kernels beside attention, each against its reference."""

import pytest
import torch
from budget import assert_within_budget, to_float64

from ttskernels._reference import path_aggregate as path_reference
from ttskernels._reference import rms_norm as norm_reference
from ttskernels._reference import rope_append as rope_reference
from ttskernels._reference import step_score as score_reference
from ttskernels.ops.path_aggregate import empty_state, path_aggregate
from ttskernels.ops.rms_norm import rms_norm
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


@pytest.mark.parametrize("sizes", [[], [0], [3, 0, 17, 1]])
def test_path_aggregate(device, sizes):
    scores, indptr = torch.rand(sum(sizes)), torch.tensor([0, *sizes]).cumsum(0).int()
    scores[2::7] = 0.0
    state = empty_state(len(sizes))
    exact = path_reference.path_aggregate(state.double(), scores.double(), indptr)
    actual = path_aggregate(*to(device, state, scores, indptr), impl="triton").cpu()
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-6, equal_nan=True)


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


def test_rope_append_to_float8(device):
    q, k, v = (torch.randint(-8, 9, (2, heads, 32)).float() for heads in (2, 1, 1))  # exact in float8
    pages = [torch.zeros(1, 16, 1, 32, device=device).to(torch.float8_e4m3fn) for _ in range(2)]
    scales = [torch.tensor([x], device=device) for x in (0.5, 2.0)]
    place = torch.tensor([7, 3], dtype=torch.int32)
    inv_freq = torch.zeros(16)  # no turn
    args = to(device, q, k, v, inv_freq, place, place)
    turned = rope_append(*args, *pages, k_scale=scales[0], v_scale=scales[1], impl="triton")
    assert torch.equal(turned.cpu(), q)
    for page, values, scale in zip(pages, (k, v), (0.5, 2.0), strict=True):
        assert torch.equal(page.cpu().float()[0, [7, 3]], (values / scale).to(torch.float8_e4m3fn).float())


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
