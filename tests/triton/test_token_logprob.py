"""token_logprob in Triton against float64 log_softmax over every logit."""

import pytest
import torch
from budget import assert_within_budget, to_float64

from ttskernels.ops.linear import linear_pack
from ttskernels.ops.token_logprob import token_logprob

DTYPES = [torch.float32, torch.float16]


def make(n, dim, vocab, dtype, weight_dtype, tokens=20):
    hidden = (torch.randn(tokens, 2 * dim) * 3).to(dtype)[:, :dim]
    rows, ids = (torch.randint(high, (n,), dtype=torch.int32) for high in (tokens, vocab))
    lm_head = (3 * torch.randn(vocab, dim) / dim**0.5).to(weight_dtype)
    return hidden, rows, lm_head, ids, (1 + torch.randn(dim) / 8).to(weight_dtype)


def plain(hidden, rows, lm_head, ids, norm):
    """A model's own way, in lm_head's dtype: norm, every logit, log_softmax, a pick."""
    x = hidden.to(lm_head.dtype)[rows.long()]
    x = x if norm is None else torch.nn.functional.rms_norm(x, x.shape[1:], norm, 1e-6)
    return torch.nn.functional.linear(x, lm_head).log_softmax(-1).gather(1, ids.long()[:, None])[:, 0]


def check(device, hidden, rows, lm_head, ids, norm, weight=None):
    exact = plain(*to_float64(hidden, rows, lm_head, ids, norm))
    low = plain(hidden, rows, lm_head, ids, norm).to(hidden.dtype)
    weight = lm_head.to(device) if weight is None else weight
    norm = None if norm is None else norm.to(device)
    args = (hidden.to(device), rows.to(device), weight, ids.to(device))
    assert_within_budget(token_logprob(*args, norm_weight=norm, impl="triton").cpu(), exact, low)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n, dim, vocab",
    [(0, 64, 100), (1, 1, 1), (3, 33, 127), (16, 64, 128), (17, 17, 129), (5, 130, 1400), (64, 16, 700), (70, 31, 257)],
)
def test_sizes(device, dtype, n, dim, vocab):
    """Both sides of a tile of tokens (64 or 128) and of dims (32 or 64), of a block of rows, more tiles than runs."""
    check(device, *make(n, dim, vocab, dtype, dtype))


@pytest.mark.parametrize("dtype, weight_dtype", [(torch.float32, torch.float16), (torch.float16, torch.float32)])
def test_mixed_dtypes_without_a_norm(device, dtype, weight_dtype):
    hidden, rows, lm_head, ids, _ = make(6, 48, 300, dtype, weight_dtype)
    check(device, hidden / 3, rows, lm_head, ids, None)


def test_packed_and_transposed(device):
    hidden, rows, lm_head, ids, norm = make(6, 48, 300, torch.float32, torch.float32)
    check(device, hidden, rows, lm_head, ids, norm, linear_pack(lm_head.to(device), impl="triton"))
    check(device, hidden, rows, lm_head, ids, norm, lm_head.T.contiguous().to(device).T)


def test_extreme_logits(device):
    """A certain token and an impossible one, in either order along the vocabulary: no overflow, no lost tail."""
    hidden = torch.tensor([[1.0], [-1.0]], device=device)
    rows, lm_head = torch.tensor([0, 1], dtype=torch.int32, device=device), torch.zeros(1000, 1, device=device)
    lm_head[0], lm_head[999] = -1000.0, 1000.0
    for id_, expected in ((0, [-2000.0, 0.0]), (999, [0.0, -2000.0]), (77, [-1000.0, -1000.0])):
        ids = torch.full_like(rows, id_)
        assert token_logprob(hidden, rows, lm_head, ids, impl="triton").tolist() == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite(device, bad):
    hidden, _, lm_head, ids, norm = (t.to(device) for t in make(4, 20, 170, torch.float32, torch.float32))
    hidden[17, 19] = bad
    rows = torch.tensor([3, 4, 17, 5], dtype=torch.int32, device=device)
    for weight in (norm, None):
        args = {"norm_weight": weight, "impl": "triton"}
        if device.type == "cpu":
            with pytest.raises(ValueError, match=r"hidden row 17 \(rows\[2\]\) has no finite log-probability of id \d+"):
                token_logprob(hidden, rows, lm_head, ids, **args)
        else:
            assert token_logprob(hidden, rows, lm_head, ids, **args).isnan().tolist() == [False, False, True, False]
        assert token_logprob(hidden, rows[:2], lm_head, ids[:2], **args).isfinite().all()


def test_errors(device):
    hidden, rows, lm_head, ids, norm = (t.to(device) for t in make(4, 20, 70, torch.float32, torch.float32))
    with pytest.raises(ValueError, match="lm_head must be float32, float16 or bfloat16, got torch.float64"):
        token_logprob(hidden, rows, lm_head.double(), ids, impl="triton")
    with pytest.raises(ValueError, match="ids must have one id per row, got 3 for 4 rows"):
        token_logprob(hidden, rows, lm_head, ids[:3], norm_weight=norm, impl="triton")
