"""Tiles and plan constants of tree attention, tried one after the other: what to write into `_triton/tiles.py` (small tile,
then large tile) and `kv/machines.py` (tasks, cost of an item, shortest piece).

A case is one tree and head shape. Its row has the cold median with what is built in, the fastest found and with what. Every
kernel is compiled once before, in as many processes as there are CPUs; results are compared with those of the built-in one.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import replace

import torch
from gpu_attention import inputs
from gpu_measure import DEVICE, DTYPE, GPU, copies_for, measure
from gpu_trees import OUR_HEADS, PAGE, Tree, of_levels, ours

from ttskernels._triton.tiles import BOX_TABLE, Tile, Tiles, architecture
from ttskernels._triton.tree_attention import tree_attention as launch
from ttskernels.kv import HeadShape
from ttskernels.models.device import device_machine

SMALL = [Tile(16, 32, 2, 3, 4), Tile(16, 32, 1, 3, 6), Tile(16, 32, 4, 3, 4, 128), Tile(16, 64, 2, 2, 4), Tile(16, 64, 4, 2),
         Tile(16, 64, 4, 3, 3, 168), Tile(16, 128, 4, 2)]  # fmt: skip
LARGE = [Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 3, 3, 168), Tile(32, 64, 4, 3), Tile(128, 64, 8, 3, 1),
         Tile(128, 128, 8, 2, 1)]  # fmt: skip
PLANS = [{"tasks_per_worker": 1.0}, {"tasks_per_worker": 2.0}, {"tasks_per_worker": 4.0, "min_piece_us": 1.0},
         {"item_us": 1.0, "min_piece_us": 1.0}, {"item_us": 4.0}]  # fmt: skip  # tasks in programs, not workers
TINY_TREE, COMPILED_ON = of_levels([(1, 33), (2, 16), (4, 5)]), of_levels([(1, 100), (64, 70)])


def cases(tiny: bool) -> dict[str, Callable[[], dict]]:
    trees, all_heads = ({"tiny": TINY_TREE}, [(4, 2, 64)]) if tiny else (ours(), OUR_HEADS[:4])
    return {
        f"{name}; {heads[0]}/{heads[1]} x {heads[2]}": lambda a=(tree, heads): case(*a)
        for heads in all_heads for name, tree in trees.items()
    }  # fmt: skip


def plan_of(tree: Tree, sizes: tuple[int, int, int], rows: int, changes: dict):
    heads = HeadShape(*sizes, sizes[2], DTYPE.itemsize)
    if "tasks_per_worker" in changes:
        changes = changes | {"tasks_per_worker": max(1, round(changes["tasks_per_worker"] * heads.kv_heads))}
    return tree.plan(heads, machine=replace(device_machine(DEVICE, heads), block_rows=rows, **changes)).to(DEVICE)


def attend(tensors: tuple, plan, tiles: Tiles, out: torch.Tensor) -> torch.Tensor:
    q, k, v = tensors
    launch(q, k, v, plan.buffer, plan.header, q.shape[2] ** -0.5, 0.0, 0, None, None, None, out, tiles, True)
    return out


def compile_one(job: tuple) -> str | None:
    """In a process of its own: the kernels end up in Triton's cache on the disk. Returns why not."""
    sizes, tiles = job
    try:
        q, k, v = (t[0] for t in inputs(COMPILED_ON, sizes, DTYPE, 1))
        plan = plan_of(COMPILED_ON, sizes, tiles.large.rows, {"item_us": 0.01, "min_piece_us": 0.01})
        attend((q, k, v), plan, tiles, torch.empty_like(q))
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 - too much shared memory, or whatever a compiler raises: a result
        return f"{type(error).__name__}: {str(error)[:80]}"
    return None


@functools.cache
def compiled(sizes: tuple[int, int, int]) -> frozenset[Tiles]:
    """Pairs of tiles that compile and run for heads of these sizes."""
    built_in = BOX_TABLE[architecture(DEVICE), sizes[2], DTYPE.itemsize]
    pairs = [Tiles(built_in.large, small) for small in SMALL] + [Tiles(large, built_in.small) for large in LARGE]
    if not GPU:
        return frozenset(pairs[:2])
    with multiprocessing.get_context("spawn").Pool(min(14, os.cpu_count() or 1)) as pool:
        failed = pool.map(compile_one, [(sizes, pair) for pair in pairs], chunksize=1)
    return frozenset(pair for pair, reason in zip(pairs, failed, strict=True) if reason is None)


def case(tree: Tree, sizes: tuple[int, int, int]) -> dict:
    unique = 2 * tree.first_page[-1] * PAGE * sizes[1] * sizes[2] * DTYPE.itemsize
    q, k, v = inputs(tree, sizes, DTYPE, copies_for(unique))
    built_in = BOX_TABLE[architecture(DEVICE), sizes[2], DTYPE.itemsize]
    out, runs, tried = torch.empty_like(q[0]), compiled(sizes), {}
    expected = attend((q[0], k[0], v[0]), plan_of(tree, sizes, built_in.large.rows, {}), built_in, out).float()

    def attempt(tiles: Tiles, changes: dict) -> float:
        key = tiles, tuple(changes.items())
        if key not in tried:
            plan = plan_of(tree, sizes, tiles.large.rows, changes)
            out.fill_(float("nan"))
            error = (attend((q[0], k[0], v[0]), plan, tiles, out).float() - expected).abs().max().item()
            if not error < 0.02:
                raise RuntimeError(f"{tiles} {changes} differs by {error:.3g}")
            times = measure(lambda i: attend((q[i], k[i], v[i]), plan, tiles, out), len(q))
            tried[key] = times["cold"]["median_us"] if times else float(len(tried))
        return tried[key]

    small = min((s for s in SMALL if Tiles(built_in.large, s) in runs), key=lambda s: attempt(Tiles(built_in.large, s), {}))
    large = min((t for t in LARGE if Tiles(t, built_in.small) in runs), key=lambda t: attempt(Tiles(t, small), {}),
                default=built_in.large)  # fmt: skip
    changes = min([{}, *PLANS] if GPU else [{}], key=lambda c: attempt(Tiles(large, small), c))
    return {
        "built_in_us": attempt(built_in, {}), "best_us": attempt(Tiles(large, small), changes), "small": tuple(small),
        "large": tuple(large), "plan": str(changes), "tried": len(tried),
    }  # fmt: skip
