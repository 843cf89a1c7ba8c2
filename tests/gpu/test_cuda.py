"""csrc/cuda on a GPU: plan advance against the CPU's, page copy against the reference, both inside a graph."""

import pytest
import torch

from ttskernels import _dispatch
from ttskernels.kv import HeadShape, plan_from_parents
from ttskernels.kv.machines import gpu_machine
from ttskernels.ops.page_copy import page_copy

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def library():
    reason = _dispatch.available("cuda")
    if reason is not None:
        pytest.skip(f"impl cuda: {reason}")


@pytest.mark.parametrize("leaves", [1, 255, 600])
def test_plan_advance(device, leaves):
    """Token by token until the shortest leaf is full: then nothing moves, and the count says how many could not."""
    from ttskernels._cuda.plan_advance import plan_advance

    length = [40] + [1 + i % 9 for i in range(leaves)]
    pages = [3] + [2] * leaves
    indptr = torch.tensor([0, *pages]).cumsum(0).tolist()
    heads = HeadShape(4, 2, 64, 64, 2)
    plan = plan_from_parents(
        [-1] + [0] * leaves, length, indptr, torch.randperm(indptr[-1]).tolist(), list(range(1, leaves + 1)),
        [40 + n - 1 for n in length[1:]], heads, cached=[40] + [n - 1 for n in length[1:]], machine=gpu_machine(heads),
    )  # fmt: skip
    held, stuck = plan.to(device), torch.full((1,), -1, dtype=torch.int32, device=device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan_advance(held.buffer, stuck)
    for _ in range(40):
        moved = plan.advance()
        graph.replay()
        assert torch.equal(held.buffer.cpu(), plan.buffer)
        assert (stuck.item() == 0) == moved
    assert not moved and 0 < stuck.item() <= leaves


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("dim", [128, 80, 6])
def test_page_copy(device, dtype, dim):
    pools = [torch.randn(5, 60, 16, 2, d).to(dtype).view(torch.uint8) for d in (dim, dim)]
    pairs = torch.tensor([(i, 20 + i, (i * 5) % 17) for i in range(20)], dtype=torch.int32)
    want = [p.clone() for p in pools]
    page_copy(*want, pairs, impl="reference")
    mine = [p.to(device) for p in pools]
    page_copy(*mine, pairs.to(device), impl="cuda")
    assert all(torch.equal(a.cpu(), b) for a, b in zip(mine, want, strict=True))
