"""Planning: C++ and NumPy planners, a whole build_plan call, and advance, over a step-search tree.

The tree is a prompt with `leaves` open leaves below a few levels of steps. For 256 leaves the goals are
C++ build 50 us, advance 5 us, NumPy build 3 ms.
"""

import ctypes
import random

import pytest
import torch

from ttskernels import _dispatch
from ttskernels.kv import Forest, HeadShape, PagePool, build_plan, plan_from_block_tables
from ttskernels.kv import plan as planning

HEADS = HeadShape(28, 4, 128, 128, 2)
LEAVES = [16, 64, 256]
needs_cpp = pytest.mark.skipif(_dispatch.load_extension() is not None, reason="needs the C++ extension")


def step_tree(leaves: int, prompt: int = 1024, fan_out: int = 4, step: int = 80):
    """Beam search after its last fork: fan_out children per node, steps of about `step` tokens."""
    rng = random.Random(0)
    forest = Forest(PagePool(1, 4, 128, 1 << 14, torch.bfloat16))
    level = [forest.add(None, range(prompt))]
    forest.reserve(level, 0)
    forest.mark_cached(level)
    while len(level) < leaves:
        nodes = [c for node in level for c in forest.fork(node, fan_out)]
        sizes = [1 if len(nodes) >= leaves else rng.randrange(step // 2, 2 * step) for _ in nodes]
        forest.reserve(nodes, [max(n, 64) for n in sizes])
        for node, n in zip(nodes, sizes, strict=True):
            forest.append(node, range(n))
        if len(nodes) < leaves:
            forest.mark_cached(nodes)
        level = nodes
    return forest, [(node, len(node.ids) - 1, 1) for node in level]


@needs_cpp
@pytest.mark.parametrize("leaves", LEAVES)
def bench_build_cpp(benchmark, annotate, leaves, monkeypatch):
    """The C++ planner alone: compute and write, through ctypes."""
    forest, rows = step_tree(leaves)
    packed = []
    build = planning._build
    monkeypatch.setattr(planning, "_build", lambda spec, *rest: packed.append(spec) or build(spec, *rest))
    plan = build_plan(forest, rows, HEADS)
    lib, sizes, us = planning._library(), (ctypes.c_int64 * 7)(), (ctypes.c_double * 2)()
    costs = planning._packed_costs(planning.cost_constants(HEADS, planning.cpu_machine()))
    address = packed[0].ctypes.data

    def work():
        lib.ttsk_plan_compute(address, costs, sizes, us)
        lib.ttsk_plan_write(plan._address)

    benchmark(work)
    annotate(**plan.stats()._asdict())


@pytest.mark.parametrize("impl", [pytest.param("cpu", marks=needs_cpp), "reference"])
@pytest.mark.parametrize("leaves", LEAVES)
def bench_build_plan(benchmark, annotate, leaves, impl):
    """The whole Python call: walking the forest, packing, planning, a new buffer."""
    forest, rows = step_tree(leaves)
    plan = benchmark(build_plan, forest, rows, HEADS, impl=impl)
    annotate(**plan.stats()._asdict())


@pytest.mark.parametrize("impl", [pytest.param("cpu", marks=needs_cpp), "reference"])
@pytest.mark.parametrize("leaves", LEAVES)
def bench_advance(benchmark, leaves, impl):
    forest, rows = step_tree(leaves)
    plan = build_plan(forest, rows, HEADS, impl=impl)
    fresh = plan.buffer.clone()

    def rewind():
        plan.buffer.copy_(fresh)

    benchmark.pedantic(plan.advance, setup=rewind, rounds=500, warmup_rounds=5)


@pytest.mark.parametrize("impl", [pytest.param("cpu", marks=needs_cpp), "reference"])
def bench_block_tables(benchmark, impl):
    """64 sequences of 2,048 tokens in pages of 16, 1,024 tokens shared by all, 512 more by eights."""
    table = torch.empty(64, 128, dtype=torch.int32)
    table[:, :64] = torch.arange(64)
    table[:, 64:96] = 64 + torch.arange(8).repeat_interleave(8)[:, None] * 32 + torch.arange(32)
    table[:, 96:] = 1000 + torch.arange(64 * 32).view(64, 32)
    benchmark(plan_from_block_tables, table.numpy(), [2048] * 64, 16, HEADS, impl=impl)
