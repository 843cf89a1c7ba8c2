import ctypes

import numpy as np
import pytest
import torch

from ttskernels import _dispatch
from ttskernels._reference import sample as reference
from ttskernels.ops.sample import sample

PLAIN = (1.0, 0.0, 1.0, 0.0)
# Random123 known answers: counter, key, result
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def make(count, vocab, params, spread=3.0):
    logits = torch.randn(count, vocab) * spread
    keys = torch.randint(-(2**62), 2**62, (count,))
    positions = torch.randint(0, 10000, (count,), dtype=torch.int32)
    return (
        logits,
        torch.arange(count, dtype=torch.int32),
        keys,
        positions,
        torch.tensor([params] * count, dtype=torch.float32),
    )


@pytest.mark.parametrize("counter, key, expected", KNOWN)
def test_philox_known_answers(counter, key, expected):
    assert reference.philox4x32(np.array(counter), np.array(key)).tolist() == expected
    if _dispatch.load_extension() is None:
        words = [(ctypes.c_uint32 * len(v))(*v) for v in (counter, key, expected)]
        out = (ctypes.c_uint32 * 4)()
        _dispatch.library().ttsk_philox4x32(words[0], words[1], out)
        assert list(out) == expected


def off_the_borders(logits, params, u):
    """Draws at least 1e-6 away from every border of the cumulative distribution."""
    cdf = reference.kept_probabilities(logits, params).cumsum(-1)
    return ((cdf - u[:, None]).abs() > 1e-6).all(-1) | (cdf[:, -1:] <= 0).all(-1)


@pytest.mark.parametrize("vocab", [1, 5, 17, 256, 257, 1000, 49152])
@pytest.mark.parametrize(
    "params",
    [PLAIN, (0.0, 0, 1, 0), (0.7, 0, 1, 0), (1, 1, 1, 0), (1, 20, 1, 0), (0.8, 0, 0.95, 0), (1, 0, 1, 0.05),
     (1.3, 50, 0.9, 0.02), (5.0, 0, 0.7, 0), (1e-6, 0, 1, 0), (1, 1e9, 1, 0), (1, 300, 0.5, 0)],
)  # fmt: skip
def test_sample(isa, vocab, params):
    args = make(40 if vocab < 10000 else 6, vocab, params)
    tokens, logprobs = sample(*args, impl="cpu")
    expected, expected_logprobs = sample(*args, impl="reference")
    if params[0] > 0:
        sure = off_the_borders(args[0], args[4], reference.uniform(args[2], args[3]))
        assert sure.sum() >= 0.5 * len(sure)
        tokens = torch.where(sure, tokens, expected)
        logprobs = torch.where(sure, logprobs, expected_logprobs)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("params", [PLAIN, (0.6, 5, 1, 0), (1.5, 0, 0.8, 0), (1, 0, 1, 0.2)])
def test_frequencies(cpu_extension, impl, params):
    """Observed frequencies of 20,000 draws are within five standard deviations of the probabilities."""
    draws, logits = 20000, torch.randn(1, 12)
    keys = torch.full((draws,), 1234567890123)
    positions = torch.arange(draws, dtype=torch.int32)
    param_rows = torch.tensor([params] * draws)
    tokens, _ = sample(logits, torch.zeros(draws, dtype=torch.int32), keys, positions, param_rows, impl=impl)
    p = reference.kept_probabilities(logits, param_rows[:1])[0]
    seen = torch.bincount(tokens, minlength=12) / draws
    assert (seen[p == 0] == 0).all()
    assert ((seen - p).abs() <= 5 * (p * (1 - p) / draws).sqrt() + 1e-9).all()


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_ties_go_to_the_smallest_id(cpu_extension, impl):
    logits = torch.zeros(3, 600)
    logits[:, [300, 17, 599]] = 2.0
    logits[2, [17, 300]] = -0.0
    _, rows, keys, positions, _ = make(3, 4, PLAIN)
    greedy = torch.tensor([[0.0, 0, 1, 0]] * 3)
    assert sample(logits, rows, keys, positions, greedy, impl=impl)[0].tolist() == [17, 17, 599]
    top_1 = torch.tensor([[1.0, 1, 1, 0]] * 3)
    assert sample(logits, rows, keys, positions, top_1, impl=impl)[0].tolist() == [17, 17, 599]
    two = torch.tensor([[1.0, 2, 1, 0]] * 3)
    many = [sample(logits[:1], rows[:1], keys[:1], positions[:1] + i, two[:1], impl=impl)[0].item() for i in range(40)]
    assert set(many) == {17, 300}


def test_row_alone_equals_row_in_any_batch(isa):
    args = make(30, 5000, (0.9, 0, 0.95, 0.01))
    lib = _dispatch.library()
    threads = lib.ttsk_num_threads()
    try:
        results = []
        for n in (1, 3):
            lib.ttsk_set_num_threads(n)
            results.append(sample(*args, impl="cpu"))
    finally:
        lib.ttsk_set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    for i in (0, 7, 29):
        token, logprob = sample(args[0], *(a[i : i + 1] for a in args[1:]), impl="cpu")
        assert token == results[0][0][i] and logprob == results[0][1][i]


def test_draws_gather_their_rows(cpu_extension):
    logits, _, keys, positions, params = make(4, 100, (0.0, 0, 1, 0))
    rows = torch.tensor([2, 2, 0, 3], dtype=torch.int32)
    tokens, _ = sample(logits, rows, keys, positions, params)
    assert torch.equal(tokens.long(), logits[rows.long()].argmax(-1))
    empty = [a[:0] for a in (rows, keys, positions, params)]
    assert sample(logits, *empty)[0].shape == (0,)


def test_sample_opcheck(cpu_extension):
    torch.library.opcheck(torch.ops.ttskernels.sample.default, make(3, 50, PLAIN))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [0, 20, 32])
def test_non_finite_logits_name_the_row(cpu_extension, impl, value, where):
    args = make(5, 33, (0.8, 0, 0.9, 0))
    args[0][3, where] = value
    with pytest.raises(ValueError, match="row 3 has a NaN or an infinite value"):
        sample(*args, impl=impl)


def test_sample_invalid(cpu_extension):
    logits, rows, keys, positions, params = make(2, 8, PLAIN)
    with pytest.raises(ValueError, match="logits must be float32"):
        sample(logits.double(), rows, keys, positions, params)
    with pytest.raises(ValueError, match=r"rows must be torch.int32 \(2,\), got torch.int64"):
        sample(logits, rows.long(), keys, positions, params)
    with pytest.raises(ValueError, match=r"params must be torch.float32 \(2, 4\)"):
        sample(logits, rows, keys, positions, params[:, :3])
    with pytest.raises(ValueError, match=r"rows must be in \[0, 2\)"):
        sample(logits, rows + 1, keys, positions, params)
    for column, value, name in ((0, -1, "temperature"), (0, torch.nan, "temperature"), (1, -2, "top_k"),
                                (2, 0, "top_p"), (3, 1.5, "min_p")):  # fmt: skip
        broken = params.clone()
        broken[1, column] = value
        with pytest.raises(ValueError, match=rf"params\[1\]: {name}"):
            sample(logits, rows, keys, positions, broken)
    with pytest.raises(RuntimeError, match=r"rows\[1\] = 2"):
        torch.ops.ttskernels.sample(logits, rows + 1, keys, positions, params)
