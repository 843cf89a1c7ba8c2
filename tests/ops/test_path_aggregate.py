import math

import pytest
import torch

from ttskernels._reference import path_aggregate as reference
from ttskernels.ops.path_aggregate import HOWS, aggregate, empty_state, path_aggregate


def make(sizes):
    return torch.rand(sum(sizes)), torch.tensor([0, *sizes]).cumsum(0).int()


@pytest.mark.parametrize("sizes", [[], [0], [1], [3, 0, 17, 1, 61]])
def test_path_aggregate(isa, sizes):
    scores, indptr = make(sizes)
    state = path_aggregate(empty_state(len(sizes)), scores, indptr, impl="cpu")
    exact = reference.path_aggregate(empty_state(len(sizes)).double(), scores.double(), indptr)
    torch.testing.assert_close(state.double(), exact, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_reference_against_a_list(impl):
    scores, indptr = make([4, 0, 9])
    state = path_aggregate(empty_state(3), scores, indptr, impl=impl)
    for path, values in ((0, scores[:4].tolist()), (2, scores[4:].tolist())):
        expected = {
            "min": min(values),
            "last": values[-1],
            "mean": math.fsum(values) / len(values),
            "product": math.prod(values),
        }
        for how in HOWS:
            assert aggregate(state, how)[path].item() == pytest.approx(expected[how], rel=1e-5)
    assert all(aggregate(state, how)[1].isnan() for how in HOWS)


def test_cut_anywhere_gives_the_same_bits(impl):
    scores, indptr = make([11])
    whole = path_aggregate(empty_state(1), scores, indptr, impl=impl)
    for cut in range(12):
        state = path_aggregate(empty_state(1), scores[:cut], torch.tensor([0, cut]).int(), impl=impl)
        state = path_aggregate(state, scores[cut:], torch.tensor([0, 11 - cut]).int(), impl=impl)
        assert torch.equal(state, whole)


def test_fork_by_index(impl):
    """A child's state is its parent's row: folding after the fork equals folding the whole path."""
    scores, indptr = make([3, 2])
    parents = path_aggregate(empty_state(2), scores, indptr, impl=impl)
    new = torch.rand(3)
    children = path_aggregate(parents[[1, 1, 0]], new, torch.tensor([0, 1, 2, 3]).int(), impl=impl)
    path = torch.cat([scores[3:], new[1:2]])
    assert torch.equal(
        children[1], path_aggregate(empty_state(1), path, torch.tensor([0, 3]).int(), impl=impl)[0]
    )


def test_zero_negative_and_nan(impl):
    scores = torch.tensor([0.5, 0.0, 0.5, -1.0, 2.0, 0.5, math.nan])
    state = path_aggregate(empty_state(3), scores, torch.tensor([0, 3, 5, 7]).int(), impl=impl)
    assert state[0, 4] == -math.inf and aggregate(state, "product")[0] == 0
    assert aggregate(state, "product")[1].isnan()
    assert [aggregate(state, how)[1].item() for how in ("min", "last", "mean")] == [-1.0, 2.0, 0.5]
    assert all(aggregate(state, how)[2].isnan() for how in HOWS) and state[2, 0] == 2


def test_path_aggregate_opcheck(cpu_extension):
    scores, indptr = make([2, 3])
    torch.library.opcheck(torch.ops.ttskernels.path_aggregate.default, (torch.rand(2, 5), scores, indptr))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"state": torch.zeros(2, 4)},
            r"state must be float32 \[paths, 5\], got torch.float32 \(2, 4\); see empty_state",
        ),
        (
            {"scores": torch.zeros(5).double()},
            r"scores must be float32 \[n\], got torch.float64 \(5,\); pass scores.float",
        ),
        ({"indptr": torch.tensor([0, 5]).int()}, r"indptr must be int32 \[3\], got torch.int32 \(2,\)"),
        ({"indptr": torch.tensor([0, 2, 4]).int()}, "indptr must rise from 0 to 5"),
        ({"indptr": torch.tensor([0, 6, 5]).int()}, "indptr must rise from 0 to 5"),
        ({"impl": "fast"}, "impl must be one of"),
    ],
)
def test_path_aggregate_invalid(change, message):
    scores, indptr = make([2, 3])
    args = {"state": empty_state(2), "scores": scores, "indptr": indptr}
    path_aggregate(**args)
    with pytest.raises(ValueError, match=message):
        path_aggregate(**(args | change))
    with pytest.raises(ValueError, match="how must be one of"):
        aggregate(empty_state(1), "sum")
