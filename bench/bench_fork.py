"""Forking n branches off a long prefix until they can decode: fork, reserve, first ids, plan; then release.

Beside it, what transformers' cache does for the same: DynamicCache.batch_repeat_interleave (expand) and
reorder_cache (each beam step), which copy KV. Theirs is one layer of 28, ours is all layers (KV does not
move, so layers are free).
Goal: fork 256 + reserve + plan off 4,096 tokens under 1 ms.
"""

import copy

import pytest
import torch
from transformers import DynamicCache

from ttskernels.kv import Forest, HeadShape, PagePool, build_plan

HEADS = HeadShape(28, 4, 128, 128, 2)
PREFIX = 4096


def prefix_forest(layers: int):
    forest = Forest(PagePool(layers, 4, 128, 1024, torch.bfloat16))
    root = forest.add(None, range(PREFIX))
    forest.reserve([root], 0)
    forest.mark_cached([root])
    return forest, root


@pytest.mark.parametrize("n", [16, 64, 256])
def bench_fork_reserve_plan(benchmark, annotate, n):
    forest, root = prefix_forest(layers=28)
    children = []

    def clean():
        for child in children:
            forest.release(child)
        children.clear()

    def work():
        children.extend(forest.fork(root, n))
        forest.reserve(children, 16)
        for child in children:
            forest.append(child, (1,))
        return build_plan(forest, [(child, 0, 1) for child in children], HEADS)

    plan = benchmark.pedantic(work, setup=clean, rounds=100, warmup_rounds=5)
    annotate(kv_bytes_moved=0, **plan.stats()._asdict())


@pytest.mark.parametrize("n", [256])
@pytest.mark.parametrize("verb", ["fork", "reserve", "release"])
def bench_verb(benchmark, verb, n):
    forest, root = prefix_forest(layers=1)
    children = []

    def setup():
        for child in children:
            if not child.released:
                forest.release(child)
        children[:] = forest.fork(root, n) if verb != "fork" else []
        if verb == "release":
            forest.reserve(children, 16)

    work = {
        "fork": lambda: children.extend(forest.fork(root, n)),
        "reserve": lambda: forest.reserve(children, 16),
        "release": lambda: [forest.release(child) for child in children],
    }[verb]
    benchmark.pedantic(work, setup=setup, rounds=100, warmup_rounds=5)


def dynamic_cache(batch: int):
    """One layer of PREFIX tokens, 4 KV heads of 128, bf16."""
    cache = DynamicCache()
    kv = torch.randn(batch, 4, PREFIX, 128, dtype=torch.bfloat16)
    cache.update(kv, kv.clone(), 0)
    return cache


@pytest.mark.parametrize("n", [16, 32])
def bench_transformers_repeat(benchmark, annotate, n):
    benchmark.group = "transformers, one layer"
    one = dynamic_cache(1)
    state = {}

    def setup():
        state["cache"] = copy.deepcopy(one)

    benchmark.pedantic(
        lambda: state["cache"].batch_repeat_interleave(n), setup=setup, rounds=5, warmup_rounds=1
    )
    annotate(num_bytes=2 * 4 * PREFIX * 128 * 2 * n)


@pytest.mark.parametrize("n", [16, 32])
def bench_transformers_reorder(benchmark, annotate, n):
    benchmark.group = "transformers, one layer"
    cache, beams = dynamic_cache(n), torch.arange(n).roll(1)
    benchmark.pedantic(lambda: cache.reorder_cache(beams), rounds=5, warmup_rounds=1)
    annotate(num_bytes=2 * 2 * 4 * PREFIX * 128 * 2 * n)  # read and written
