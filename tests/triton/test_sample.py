import pytest
import torch

from ttskernels._reference import sample as reference
from ttskernels.ops.sample import sample


def make(count, vocab, params, spread=3.0):
    logits = torch.randn(count, vocab) * spread
    keys = torch.randint(-(2**62), 2**62, (count,))
    positions = torch.randint(0, 10000, (count,), dtype=torch.int32)
    return logits, torch.arange(count, dtype=torch.int32), keys, positions, torch.tensor([params] * count)


@pytest.mark.parametrize("vocab", [1, 17, 300, 2500, 9000])
@pytest.mark.parametrize(
    "params",
    [(1.0, 0.0, 1.0, 0.0), (0.0, 0, 1, 0), (1, 20, 1, 0), (0.8, 0, 0.95, 0), (1, 0, 1, 0.05), (1.3, 50, 0.9, 0.02),
     (1e-6, 0, 1, 0), (1, 1e9, 1, 0), (1, 200, 0.9, 0)],
)  # fmt: skip
def test_sample(device, vocab, params):
    params = tuple(map(float, params))
    args = make(4, vocab, params)
    tokens, logprobs = (t.cpu() for t in sample(*(a.to(device) for a in args), impl="triton"))
    expected, expected_logprobs = sample(*args, impl="reference")
    if params[0] > 0:  # draws within 1e-6 of a border of the cumulative distribution may go either way
        cdf = reference.kept_probabilities(args[0], args[4]).cumsum(-1)
        u = reference.uniform(args[2], args[3])
        sure = ((cdf - u[:, None]).abs() > 1e-6).all(-1)
        assert sure.sum() >= 2
        tokens, logprobs = torch.where(sure, tokens, expected), torch.where(sure, logprobs, expected_logprobs)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=4e-6, atol=4e-6)


def test_ties_go_to_the_smallest_id(device):
    logits = torch.zeros(3, 600)
    logits[:, [300, 17, 599]] = 2.0
    logits[2, [17, 300]] = -0.0
    _, rows, keys, positions, _ = make(3, 4, (1.0, 0.0, 1.0, 0.0))
    args = [t.to(device) for t in (logits, rows, keys, positions)]
    for params in ((0.0, 0, 1, 0), (1.0, 1, 1, 0), (1.0, 0, 1e-6, 0)):
        rows_of = torch.tensor([params] * 3, dtype=torch.float32, device=device)
        assert sample(*args, rows_of, impl="triton")[0].tolist() == [17, 17, 599]
    two = torch.tensor([[1.0, 2, 1, 0]] * 24, device=device)
    many = (torch.zeros(24, dtype=torch.int32), torch.randint(0, 2**40, (24,)), torch.arange(24, dtype=torch.int32))
    assert set(sample(args[0], *(t.to(device) for t in many), two, impl="triton")[0].tolist()) == {17, 300}


@pytest.mark.parametrize("params", [(1.0, 3000, 1, 0), (1.0, 0, 0.6, 0), (1.0, 3000, 0.5, 0), (1.0, 0, 1, 0.5)])
@pytest.mark.parametrize("levels", [1, 7])
def test_more_equal_logits_than_are_set_aside(device, levels, params):
    _, *args = make(3, 1, tuple(map(float, params)))
    logits = torch.randint(0, levels, (3, 5000)).float() / 4
    got = sample(*(a.to(device) for a in (logits, *args)), impl="triton")[0].cpu()
    cdf = reference.kept_probabilities(logits, args[-1]).cumsum(-1)
    assert (cdf.gather(1, got.long()[:, None])[:, 0] - reference.uniform(args[1], args[2])).abs().max() < 1e-3
    assert (reference.kept_probabilities(logits, args[-1]).gather(1, got.long()[:, None]) > 0).all()


def test_a_row_alone_equals_it_in_a_batch(device):
    logits, rows, keys, positions, _ = make(5, 5000, (1.0, 0.0, 1.0, 0.0))
    rows_of = torch.tensor([[1.0, 0, 1, 0], [0.0, 0, 1, 0], [1.0, 20, 0.9, 0], [0.7, 0, 0.8, 0], [1.0, 0, 1, 0.1]])
    args = [a.to(device) for a in (rows, keys, positions, rows_of)]
    tokens, logprobs = sample(logits.to(device), *args, impl="triton")
    for i in range(5):
        token, logprob = sample(logits.to(device), *(a[i : i + 1] for a in args), impl="triton")
        assert token == tokens[i] and logprob == logprobs[i]


def test_a_row_that_is_not_finite(device):
    args = make(2, 40, (1.0, 0.0, 1.0, 0.0))
    args[0][1, 7] = float("nan")
    if device.type == "cpu":
        with pytest.raises(ValueError, match="logits must be finite, row 1"):
            sample(*args, impl="triton")
    else:
        tokens, logprobs = sample(*(a.to(device) for a in args), impl="triton")
        assert tokens[1] == -1 and logprobs[1].isnan() and tokens[0] >= 0
