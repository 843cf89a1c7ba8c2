import pytest
import torch

from ttskernels.kv import HeadShape, plan_from_parents

HEADS = HeadShape(2, 1, 64, 64, 4)


def plan_of(tokens, reuse=None):
    """One node of so many tokens and its last row, not cached, with room to advance."""
    return plan_from_parents([-1], [tokens], [0, 2], [3, 1], [0], [tokens - 1], HEADS, cached=[tokens - 1], reuse=reuse)


def test_views_and_upload():
    plan = plan_of(5)
    copy = plan.to("cpu")
    address = copy.buffer.data_ptr()
    assert copy.header == plan.header and copy.num_rows == 1
    assert (copy.positions.tolist(), copy.slots.tolist()) == ([4], [3 * 16 + 4])
    assert plan.advance()
    assert copy.positions.tolist() == [4], "a copy moves on upload alone"
    copy.upload(plan)
    assert (copy.positions.tolist(), copy.slots.tolist()) == ([5], [3 * 16 + 5])
    copy.upload(plan_of(17, reuse=plan))
    assert (copy.positions.tolist(), copy.slots.tolist()) == ([16], [1 * 16])
    assert copy.buffer.data_ptr() == address and torch.equal(copy.buffer, plan.buffer)


def test_another_capacity_is_refused():
    big = plan_from_parents([-1], [20], [0, 2], [3, 1], [0] * 20, list(range(20)), HEADS)
    with pytest.raises(ValueError, match="capacities and launches of the one that was uploaded first"):
        plan_of(5).to("cpu").upload(big)


def test_other_launches_are_refused():
    """Pages that do not follow each other: a launch that reads boxes of rows would read others."""
    straight, broken = (plan_from_parents([-1], [20], [0, 2], pages, [0], [19], HEADS) for pages in ([2, 3], [3, 1]))
    with pytest.raises(ValueError, match="capacities and launches"):
        straight.to("cpu").upload(broken)
