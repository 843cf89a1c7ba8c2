import pytest
import torch
from budget import assert_within_budget

from ttskernels._reference import step_score as reference
from ttskernels.ops.step_score import step_score

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SQUASHES = ["softmax", "sigmoid", "none"]


def make(
    n,
    dim,
    *,
    dtype=torch.float32,
    weight_dtype=torch.float32,
    labels=2,
    inner=0,
    norm=True,
    bias=True,
    tokens=40,
):
    hidden = torch.randn(tokens, dim).to(dtype)
    rows = torch.randint(tokens, (n,), dtype=torch.int32)
    heads = {"weight": (torch.randn(labels, inner or dim) / 4).to(weight_dtype)}
    if labels > 1:
        heads["mix"] = torch.randn(labels)
    if norm:
        heads["norm_weight"] = (1 + torch.randn(dim) / 8).to(weight_dtype)
    if bias:
        heads["bias"] = torch.randn(labels).to(weight_dtype)
    if inner:
        heads["inner_weight"] = (torch.randn(inner, dim) / dim**0.5).to(weight_dtype)
        heads["inner_bias"] = torch.randn(inner) / 4
    return hidden, rows, heads


def in_float64(hidden, rows, heads, squash, run=reference.step_score, eps=1e-6):
    wide = {k: v.double() for k, v in heads.items()}
    names = ("norm_weight", "inner_weight", "inner_bias", "weight", "bias", "mix")
    norm, inner_w, inner_b, weight, bias, mix = (wide.get(n) for n in names)
    return run(hidden.double(), rows, norm, eps, inner_w, inner_b, weight, bias, squash, mix)


@pytest.mark.parametrize("inner", [0, 37])
@pytest.mark.parametrize("squash", SQUASHES)
@pytest.mark.parametrize("n, dim, labels", [(0, 64, 2), (1, 1, 1), (5, 17, 3), (9, 128, 2)])
def test_step_score(isa, n, dim, labels, squash, inner):
    hidden, rows, heads = make(n, dim, labels=labels, inner=inner)
    exact = in_float64(hidden, rows, heads, squash)
    low = step_score(hidden, rows, squash=squash, impl="reference", **heads)
    assert_within_budget(step_score(hidden, rows, squash=squash, impl="cpu", **heads), exact, low, factor=4)


# of 3 labels: a probability, a difference of two (PURE), a sum of two (ReasonEval)
@pytest.mark.parametrize("mix", [(0, 1, 0), (-1, 1, 0), (0, 1, 1)])
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_mix(impl, mix, request):
    if impl == "cpu":
        request.getfixturevalue("cpu_extension")
    hidden, rows, heads = make(6, 40, labels=3, norm=False)
    heads["mix"] = torch.tensor(mix, dtype=torch.float32)
    p = torch.softmax(hidden[rows.long()] @ heads["weight"].T + heads["bias"], -1)
    expected = {(0, 1, 0): p[:, 1], (-1, 1, 0): p[:, 1] - p[:, 0], (0, 1, 1): 1 - p[:, 0]}[mix]
    torch.testing.assert_close(step_score(hidden, rows, impl=impl, **heads), expected)


@pytest.mark.parametrize("squash", SQUASHES)
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_one_label_needs_no_mix(impl, squash, request):
    if impl == "cpu":
        request.getfixturevalue("cpu_extension")
    hidden, rows, heads = make(5, 24, labels=1)
    scores = step_score(hidden, rows, squash=squash, impl=impl, **heads)
    assert torch.equal(scores, step_score(hidden, rows, squash=squash, impl=impl, mix=torch.ones(1), **heads))
    if squash == "softmax":
        assert (scores == 1).all()


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm, bias", [(True, True), (False, False)])
def test_dtypes(isa, dtype, weight_dtype, norm, bias):
    hidden, rows, heads = make(6, 96, dtype=dtype, weight_dtype=weight_dtype, norm=norm, bias=bias, inner=16)
    exact = in_float64(hidden, rows, heads, "softmax")
    low = step_score(hidden, rows, impl="reference", **heads)
    assert_within_budget(step_score(hidden, rows, impl="cpu", **heads), exact, low, factor=4)


@pytest.mark.parametrize("inner", [0, 33])
def test_scores_do_not_depend_on_the_batch(isa, inner):
    hidden, rows, heads = make(13, 200, dtype=torch.bfloat16, weight_dtype=torch.bfloat16, inner=inner)
    together = step_score(hidden, rows, impl="cpu", **heads)
    alone = torch.cat([step_score(hidden, rows[i : i + 1], impl="cpu", **heads) for i in range(len(rows))])
    assert torch.equal(together, alone)
    wide = torch.randn(40, 400, dtype=torch.bfloat16)
    wide[:, :200] = hidden
    assert torch.equal(step_score(wide[:, :200], rows, impl="cpu", **heads), together)


def second_formulation(hidden, rows, norm, eps, inner_weight, inner_bias, weight, bias, squash, mix):
    """torch.nn modules over every token, one score picked at each row: what a plain model computes."""
    x = hidden if norm is None else torch.nn.functional.rms_norm(hidden, hidden.shape[-1:], norm, eps)
    if inner_weight is not None:
        x = torch.nn.functional.linear(x, inner_weight, inner_bias).clamp(min=0)
    logits = torch.nn.functional.linear(x, weight, bias)
    every = {
        "none": logits,
        "sigmoid": 1 / (1 + torch.exp(-logits)),
        "softmax": torch.exp(logits - torch.logsumexp(logits, -1, keepdim=True)),
    }[squash]
    return (every @ mix)[rows.long()]


@pytest.mark.parametrize("squash", SQUASHES)
@pytest.mark.parametrize("inner", [0, 9])
def test_reference_against_torch(squash, inner):
    hidden, rows, heads = make(7, 24, inner=inner, labels=3)
    args = (hidden, rows, heads, squash)
    torch.testing.assert_close(in_float64(*args), in_float64(*args, run=second_formulation))


def test_extreme_logits(isa):
    """A label that is certain: no overflow on either side."""
    hidden, rows = torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1], dtype=torch.int32)
    weight = torch.tensor([[0.0], [500.0]])
    for squash, mix, expected in (
        ("softmax", (0, 1), [1, 0]),
        ("softmax", (-1, 1), [1, -1]),
        ("sigmoid", (0, 1), [1, 0]),
        ("none", (0, 1), [500, -500]),
    ):
        mix = torch.tensor(mix, dtype=torch.float32)
        assert step_score(hidden, rows, weight, squash=squash, mix=mix, impl="cpu").tolist() == expected


@pytest.mark.parametrize("mix", [(1, 1), (0, 1, 1), (1, 0.5, 1, 1, 1)])
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_a_mix_within_one_gives_no_score_above_one(impl, mix, request):
    if impl == "cpu":
        request.getfixturevalue("cpu_extension")
    hidden, weight = torch.randn(2000, 8), torch.randn(len(mix), 8)
    bias = torch.tensor([0.0 if m == 1 else -20.0 for m in mix])  # near 1, where rounding would show
    scores = step_score(
        hidden, torch.arange(2000, dtype=torch.int32), weight, bias=bias, mix=torch.tensor(mix).float(), impl=impl
    )
    assert scores.min() > 0 and scores.max() == 1


@pytest.mark.parametrize("inner", [0, 5])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_hidden_not_finite(impl, bad, inner, request):
    if impl == "cpu":
        request.getfixturevalue("cpu_extension")
    hidden, _, heads = make(0, 20, inner=inner, norm=False)
    hidden[17, 19] = bad
    rows = torch.tensor([3, 4, 17, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"hidden row 17 \(rows\[2\]\) has no finite score"):
        step_score(hidden, rows, impl=impl, squash="sigmoid", **heads)
    assert (
        step_score(hidden, rows[:2], impl=impl, **heads).isfinite().all()
    )  # a row that is not read does no harm


@pytest.mark.parametrize("inner", [False, True])
def test_step_score_opcheck(cpu_extension, inner):
    hidden, rows, heads = make(4, 32, inner=8 if inner else 0, labels=2 if inner else 1)
    get = heads.get
    args = (
        hidden,
        rows,
        get("norm_weight"),
        1e-6,
        get("inner_weight"),
        get("inner_bias"),
        get("weight"),
        get("bias"),
    )
    torch.library.opcheck(torch.ops.ttskernels.step_score.default, (*args, "softmax", get("mix")))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda a: {"hidden": a["hidden"][0]},
            r"hidden must be floating point \[tokens, dim\], got torch.float32 \(8,\)",
        ),
        (
            lambda a: {"rows": a["rows"].long()},
            r"rows must be int32 \[n\], got torch.int64 \(3,\); pass rows.to",
        ),
        (lambda a: {"rows": a["rows"] + 40}, r"rows must be in 0..39, got \d+..\d+"),
        (lambda a: {"weight": a["weight"][:, :3]}, r"weight must be \[labels, 4\], got \(2, 3\)"),
        (
            lambda a: {"inner_weight": a["inner_weight"][:, :7]},
            r"inner_weight must be \[inner, 8\], got \(4, 7\)",
        ),
        (
            lambda a: {"inner_weight": a["inner_weight"].half()},
            "inner_weight must have weight's dtype torch.float32",
        ),
        (lambda a: {"inner_weight": None}, "inner_bias needs inner_weight"),
        (lambda a: {"norm_weight": a["norm_weight"][:3]}, r"norm_weight must be \[8\], got \(3,\)"),
        (lambda a: {"bias": a["bias"][:1]}, r"bias must be \[2\], got \(1,\)"),
        (lambda a: {"squash": "tanh"}, "squash must be one of"),
        (lambda a: {"squash": "difference"}, "squash must be one of"),
        (lambda a: {"mix": None}, r"mix must be \[2\] for a weight of 2 labels, got None; pass how much"),
        (lambda a: {"mix": a["mix"][:1]}, r"mix must be float32 \[2\], got torch.float32 \(1,\)"),
        (lambda a: {"mix": a["mix"].double()}, r"mix must be float32 \[2\], got torch.float64"),
        (lambda a: {"mix": a["mix"] / 0}, r"mix must be finite, got \[.*inf"),
        (lambda a: {"impl": "fast"}, "impl must be one of"),
    ],
)
def test_step_score_invalid(change, message):
    hidden, rows, heads = make(3, 8, inner=4)
    args = {"hidden": hidden, "rows": rows, **heads}
    step_score(**args)
    with pytest.raises(ValueError, match=message):
        step_score(**(args | change(args)))
