"""refine_logits against its reference, and against the definition in float64: at every level of this CPU."""

import pytest
import torch

from ttskernels._reference import refine_logits as reference
from ttskernels.ops.refine_logits import refine_logits


def make(rows, vocab, dim, dtype, scale=1.0):
    x, weight = torch.randn(rows, dim), (torch.randn(vocab, dim) * scale).to(dtype)
    exact = x.double() @ weight.double().T
    return exact, x, weight, (exact + 0.05 * torch.randn(rows, vocab)).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows, vocab, dim", [(0, 5, 3), (1, 1, 1), (1, 17, 16), (3, 15, 33), (2, 1000, 576), (67, 301, 64)])
@pytest.mark.parametrize("scale", [0.02, 1.0])  # flat rows, of which sixteen are chosen, and peaked ones
def test_the_largest_are_exact_and_the_others_stay(isa, rows, vocab, dim, dtype, scale):
    exact, x, weight, logits = make(rows, vocab, dim, dtype, scale)
    refined, expected = logits.clone(), logits.clone()
    refine_logits(refined, x, weight, impl="cpu")
    reference.refine_logits(expected, x, weight)
    magnitude = (x.double().abs() @ weight.double().abs().T).amax(1, keepdim=True)
    assert ((refined - expected).abs() <= 1e-6 * magnitude).all()
    order = logits.argsort(dim=1, descending=True, stable=True)
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order[:, :16], True)
    chosen &= logits >= logits.amax(1, keepdim=True) - 3.0
    assert torch.equal(refined[~chosen], logits[~chosen])
    assert ((refined - exact).abs()[chosen] <= (1e-6 * magnitude).expand_as(exact)[chosen]).all()
    assert (chosen.any(1) & (chosen.sum(1) <= 16)).all()


def test_of_equal_logits_the_first(isa):
    logits, x, weight = torch.zeros(2, 40), torch.ones(2, 8), torch.full((40, 8), 0.5)
    logits[1, 30:] = 1e-3
    refine_logits(logits, x, weight, impl="cpu")
    assert logits[0].nonzero().flatten().tolist() == list(range(16))
    assert (logits[1] == 4).nonzero().flatten().tolist() == [*range(6), *range(30, 40)]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_stay(isa, bad):
    _, x, weight, logits = make(3, 50, 20, torch.bfloat16)
    logits[1, 49] = bad
    refined = logits.clone()
    refine_logits(refined, x, weight, impl="cpu")
    assert torch.equal(refined[1, :49], logits[1, :49]) and not torch.equal(refined[0], logits[0])
    assert not refined[1, 49].isfinite()


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_a_row_has_the_same_bits_alone(cpu_extension, impl):
    _, x, weight, logits = make(9, 120, 65, torch.bfloat16)
    together, alone = logits.clone(), logits[4:5].clone()
    refine_logits(together, x, weight, impl=impl)
    refine_logits(alone, x[4:5], weight, impl=impl)
    assert torch.equal(alone[0], together[4])


def test_wrong_arguments_are_refused(cpu_extension):
    _, x, weight, logits = make(3, 10, 4, torch.bfloat16)
    for wrong in ((logits.double(), x, weight), (logits.T, x, weight), (logits, x[:2], weight), (logits, x[:, :3], weight),
                  (logits, x, weight[:9]), (logits, x, weight.int()), (logits, x.int(), weight)):  # fmt: skip
        with pytest.raises(ValueError, match="(logits|x|weight) must be"):
            refine_logits(*wrong)
        with pytest.raises(RuntimeError):
            torch.ops.ttskernels.refine_logits(*wrong)


def test_opcheck(cpu_extension):
    _, x, weight, logits = make(3, 40, 9, torch.bfloat16)
    torch.library.opcheck(torch.ops.ttskernels.refine_logits.default, (logits, x, weight))
