import pytest
import torch
from budget import assert_within_budget, to_float64

from ttskernels import _dispatch
from ttskernels._reference import token_logprob as reference
from ttskernels.ops.linear import linear_pack
from ttskernels.ops.token_logprob import token_logprob

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(n, dim, vocab, *, dtype=torch.float32, weight_dtype=torch.float32, tokens=40):
    hidden = torch.randn(tokens, dim).to(dtype)
    rows = torch.randint(tokens, (n,), dtype=torch.int32)
    lm_head = (3 * torch.randn(vocab, dim) / dim**0.5).to(weight_dtype)
    ids = torch.randint(vocab, (n,), dtype=torch.int32)
    return hidden, rows, lm_head, ids, (1 + torch.randn(dim) / 8).to(weight_dtype)


def torch_logprob(hidden, rows, lm_head, ids, norm, eps=1e-6):
    """What a plain model computes: normed hidden states, every logit, log_softmax, a pick; all in one dtype."""
    x = torch.nn.functional.rms_norm(hidden.to(lm_head.dtype), hidden.shape[-1:], norm, eps)[rows.long()]
    logits = torch.nn.functional.linear(x, lm_head)
    return logits.log_softmax(-1).gather(1, ids.long()[:, None])[:, 0]


def exact_and_low(hidden, rows, lm_head, ids, norm):
    wide = to_float64(hidden, rows, lm_head, ids, norm)
    return torch_logprob(*wide), torch_logprob(hidden, rows, lm_head, ids, norm)


@pytest.mark.parametrize(
    "n, dim, vocab", [(0, 64, 100), (1, 1, 1), (1, 33, 61), (7, 64, 64), (5, 17, 65), (25, 31, 8209), (389, 16, 127)]
)
def test_token_logprob(isa, n, dim, vocab):
    """Sizes on both sides of a panel (64), a slice (128 panels), a block (24 rows) and a chunk (384 rows)."""
    hidden, rows, lm_head, ids, norm = make(n, dim, vocab)
    exact, low = exact_and_low(hidden, rows, lm_head, ids, norm)
    packed = token_logprob(hidden, rows, linear_pack(lm_head, impl="cpu"), ids, norm_weight=norm)
    assert_within_budget(packed, exact, low)
    assert torch.equal(token_logprob(hidden, rows, lm_head, ids, norm_weight=norm, impl="cpu"), packed)


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(isa, dtype, weight_dtype):
    hidden, rows, lm_head, ids, norm = make(9, 97, 321, dtype=dtype, weight_dtype=weight_dtype)
    exact, low = exact_and_low(hidden, rows, lm_head, ids, norm)
    for weight in (linear_pack(lm_head, impl="cpu"), lm_head):
        assert_within_budget(token_logprob(hidden, rows, weight, ids, norm_weight=norm), exact, low)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_batch(isa, weight_dtype, packed):
    hidden, rows, lm_head, ids, norm = make(401, 65, 300, dtype=torch.bfloat16, weight_dtype=weight_dtype)
    weight = linear_pack(lm_head, impl="cpu") if packed else lm_head
    lib = _dispatch.library()
    threads = lib.ttsk_num_threads()

    def run(which):
        return token_logprob(hidden, rows[which], weight, ids[which], norm_weight=norm)

    try:
        lib.ttsk_set_num_threads(1)
        together = run(slice(None))
        lib.ttsk_set_num_threads(3)
        for which in (slice(None), slice(0, 7), slice(370, 401), slice(400, 401), slice(100, 197)):
            assert torch.equal(run(which), together[which]), f"rows {which}"
    finally:
        lib.ttsk_set_num_threads(threads)


def test_strided(cpu_extension):
    hidden, rows, lm_head, ids, norm = make(11, 48, 130)
    expected = token_logprob(hidden, rows, lm_head, ids, norm_weight=norm, impl="cpu")
    wide, tall = torch.randn(40, 100), torch.randn(48, 130)
    wide[:, :48], tall[:] = hidden, lm_head.T
    assert torch.equal(token_logprob(wide[:, :48], rows, tall.T, ids, norm_weight=norm, impl="cpu"), expected)
    assert torch.equal(token_logprob(wide.T[:48].T, rows, lm_head, ids, norm_weight=norm, impl="cpu"), expected)


@pytest.mark.parametrize("normed", [False, True])
def test_reference_against_torch(normed, monkeypatch):
    monkeypatch.setattr(reference, "TILE", 7)
    hidden, rows, lm_head, ids, norm = to_float64(*make(6, 12, 29))
    ours = token_logprob(hidden, rows, lm_head, ids, norm_weight=norm if normed else None, impl="reference")
    x = torch.nn.functional.rms_norm(hidden, (12,), norm, 1e-6) if normed else hidden
    probabilities = (x @ lm_head.T)[rows.long()].exp()
    expected = (probabilities[range(6), ids.long()] / probabilities.sum(1)).log()
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_extreme_logits(impl, request):
    """A certain token and an impossible one, in either order along the vocabulary: no overflow, no lost tail."""
    if impl == "cpu":
        request.getfixturevalue("cpu_extension")
    hidden, rows = torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1], dtype=torch.int32)
    lm_head = torch.zeros(9000, 1)
    lm_head[[0, 8999], 0] = torch.tensor([-1000.0, 1000.0])
    for id_, expected in ((0, [-2000.0, 0.0]), (8999, [0.0, -2000.0]), (77, [-1000.0, -1000.0])):
        ids = torch.tensor([id_, id_], dtype=torch.int32)
        assert token_logprob(hidden, rows, lm_head, ids, impl=impl).tolist() == expected


def test_a_uniform_vocabulary(isa):
    hidden, rows, ids = torch.ones(1, 5), torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    for vocab in (1, 63, 64, 65, 8191, 8192, 50257):  # padding columns and merges must add nothing
        expected = -torch.tensor([vocab], dtype=torch.float64).log().float()
        ours = token_logprob(hidden, rows, torch.ones(vocab, 5), ids, impl="cpu")
        torch.testing.assert_close(ours, expected, rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_hidden_not_finite(impl, bad, request):
    if impl == "cpu":
        request.getfixturevalue("cpu_extension")
    hidden, _, lm_head, ids, norm = make(4, 20, 70)
    hidden[17, 19] = bad
    rows = torch.tensor([3, 4, 17, 5], dtype=torch.int32)
    for weight in (norm, None):
        with pytest.raises(ValueError, match=r"hidden row 17 \(rows\[2\]\) has no finite log-probability of id \d+"):
            token_logprob(hidden, rows, lm_head, ids, norm_weight=weight, impl=impl)
    token_logprob(hidden, rows[:2], lm_head, ids[:2], impl=impl)  # a row that is not read does no harm


@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_opcheck(cpu_extension, weight_dtype):
    hidden, rows, lm_head, ids, norm = make(4, 32, 70, dtype=torch.bfloat16, weight_dtype=weight_dtype)
    op = torch.ops.ttskernels.token_logprob.default
    for weight in (lm_head, linear_pack(lm_head, impl="cpu").data):
        torch.library.opcheck(op, (hidden, rows, norm.float(), 1e-6, weight, 70, weight_dtype, ids))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: {"hidden": a["hidden"][:, :7]}, r"hidden must be floating point \[tokens, 8\].*\(40, 7\)"),
        (lambda a: {"hidden": a["hidden"].long()}, r"hidden must be floating point .* got torch.int64"),
        (lambda a: {"rows": a["rows"].long()}, r"rows must be int32 \[n\], got torch.int64 \(3,\); pass rows.to"),
        (lambda a: {"rows": a["rows"] + 40}, r"rows must be in 0..39, got \d+..\d+"),
        (lambda a: {"ids": a["ids"][:, None]}, r"ids must be int32 \[n\], got torch.int32 \(3, 1\)"),
        (lambda a: {"ids": a["ids"] - 11}, r"ids must be in 0..10, got -\d+..-\d+"),
        (lambda a: {"ids": a["ids"][:2]}, "ids must have one id per row, got 2 for 3 rows"),
        (lambda a: {"lm_head": a["lm_head"][0]}, r"lm_head must be \[vocab, dim\], both at least 1, got \(8,\)"),
        (lambda a: {"lm_head": a["lm_head"].double(), "impl": "cpu"}, "lm_head must be float32, float16 or bfloat16"),
        (lambda a: {"lm_head": a["lm_head"].to("meta")}, "lm_head must be on hidden's device cpu, got meta"),
        (lambda a: {"norm_weight": a["norm_weight"][:3]}, r"norm_weight must be \[8\], got \(3,\)"),
        (lambda a: {"impl": "fast"}, "impl must be one of"),
        (
            lambda a: {"lm_head": linear_pack(a["lm_head"], impl="cpu"), "impl": "reference"},
            "lm_head was packed for impl 'cpu', got impl='reference'",
        ),
        (
            lambda a: {"lm_head": linear_pack(a["lm_head"], form="int8", impl="cpu")},
            "lm_head must be packed with form='float', got 'int8'",
        ),
    ],
)
def test_invalid(cpu_extension, change, message):
    names = ("hidden", "rows", "lm_head", "ids", "norm_weight")
    args = dict(zip(names, make(3, 8, 11), strict=True))
    token_logprob(**args)
    with pytest.raises(ValueError, match=message):
        token_logprob(**(args | change(args)))


def test_a_wrong_packed_size_raises(cpu_extension):
    hidden, rows, lm_head, ids, _ = make(3, 8, 70)
    packed = linear_pack(lm_head, impl="cpu").data
    with pytest.raises(RuntimeError, match="lm_head must have .* bytes for vocab 70"):
        torch.ops.ttskernels.token_logprob(hidden, rows, None, 1e-6, packed[:64], 70, torch.float32, ids)
