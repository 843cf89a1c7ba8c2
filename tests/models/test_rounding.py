"""Rounding for given inputs: against plain rounding, against the definition, and what has no good answer."""

import pytest
import torch

from ttskernels._reference.linear import fixed_weight, turn
from ttskernels.models.rounding import DAMPING, round_weight, second_moments
from ttskernels.ops.linear import linear, linear_pack


def inputs(rows, k, rank=12):
    """Rows that lie near a few directions, as activations do."""
    return torch.randn(rows, rank) @ torch.randn(rank, k) + 0.2 * torch.randn(rows, k)


def loss(weight, values, scales, moments):
    """Of each row: the squared error of its products with the inputs that the (damped) moments are of."""
    damped = moments.double() + DAMPING * moments.double().diagonal().mean() * torch.eye(len(moments), dtype=torch.float64)
    wide = values.double().unflatten(1, (scales.shape[1], -1)) * scales.double()[..., None]
    error = turn(weight).double() - wide.flatten(1)
    return ((error @ damped) * error).sum(1)


@pytest.mark.parametrize("n, k", [(1, 1), (3, 64), (70, 65), (33, 200), (7, 320), (5, 576)])
def test_products_lose_less_than_by_plain_rounding(n, k):
    x, weight = inputs(600, k), torch.randn(n, k)
    moments = second_moments(x)
    ours, plain = round_weight(weight, moments), fixed_weight(weight, "int8")
    assert ours.values.dtype == torch.int8 and ours.values.abs().max() <= 127 and ours.shape == (n, k)
    assert ours.values.shape[1] == -(-k // 64) * 64
    lost, plainly = (loss(weight, *parts, moments).mean() for parts in ((ours.values, ours.scales), plain))
    assert lost <= 0.5 * plainly if k >= 64 else lost <= 1.1 * plainly
    exact = x.double() @ weight.double().T
    y = linear(x, linear_pack(ours, form="int8", impl="reference")).double()
    whole = linear(x, linear_pack(weight, form="int8", impl="reference")).double()
    assert (y - exact).norm() <= 1.05 * (whole - exact).norm()  # the inputs' own rounding is in both


def test_unrelated_inputs_are_plain_rounding():
    """Second moments of a multiple of one: there is nothing to make up for."""
    weight = torch.randn(40, 150)
    ours = round_weight(weight, 3.0 * torch.eye(192))
    values, scales = fixed_weight(weight, "int8")
    assert torch.equal(ours.values.float(), values)
    torch.testing.assert_close(ours.scales, scales)


def test_the_last_weight_of_a_row_is_the_best_one_given_the_others():
    """What is left of the definition when all others are held: no neighbour of the last integer loses less."""
    x, weight = inputs(300, 128), torch.randn(50, 128)
    moments = second_moments(x)
    ours = round_weight(weight, moments)
    kept = loss(weight, ours.values, ours.scales, moments)
    inside = ours.values[:, -1].abs() < 127
    for step in (-1, 1):
        other = ours.values.clone()
        other[:, -1] += torch.where(inside, step, 0).to(torch.int8)
        assert (loss(weight, other, ours.scales, moments) >= kept * (1 - 1e-4))[inside].all()


def test_a_row_does_not_depend_on_the_others():
    x, weight = inputs(300, 130), torch.randn(20, 130)
    whole, some = round_weight(weight, second_moments(x)), round_weight(weight[7:9], second_moments(x))
    assert (whole.values[7:9] != some.values).float().mean() <= 0.05  # sums of another matrix product may break a tie
    torch.testing.assert_close(whole.scales[7:9], some.scales, rtol=0.02, atol=0)


def test_zeros_and_what_is_not_finite():
    x, weight = inputs(300, 380), torch.randn(6, 380)
    weight[0], weight[1, :192], weight[2, 200] = 0, 1e-38, torch.nan
    rounded = round_weight(weight, second_moments(x))
    assert (rounded.values[0] == 0).all() and (rounded.scales[0] == 0).all()
    assert rounded.scales[1, 0] == 0 and (rounded.values[1, :192] == 0).all()
    assert rounded.scales[2, 1:].isnan().all()
    y = linear(x[:3], linear_pack(rounded, form="int8", impl="reference"))
    assert torch.equal(y.isnan().any(0), torch.tensor([False, False, True, False, False, False]))
    assert (round_weight(weight[3:], torch.zeros(384, 384)).values != 0).any()  # inputs that were always zero
    x[1, 1] = torch.inf
    with pytest.raises(ValueError, match="moments must be finite .*; an input was not finite"):
        round_weight(weight, second_moments(x))
    with pytest.raises(ValueError, match=r"moments must be finite \[384, 384\], got \[64, 64\]"):
        round_weight(weight, torch.eye(64))
