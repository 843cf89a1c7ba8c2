"""Small launches of tree attention whose rows have many partial results, and of more tasks than programs, for
compute-sanitizer to watch.

    compute-sanitizer --tool memcheck|racecheck|synccheck python tests/gpu/sanitize_merge.py
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import torch  # noqa: E402

GPU = torch.cuda.is_available()
if not GPU:
    import os

    os.environ.setdefault("TRITON_INTERPRET", "1")

from attention import DEEP, DEEP_ROWS, expected, make  # noqa: E402
from budget import assert_within_budget  # noqa: E402
from plans import build_plan, make_trees, planned  # noqa: E402

from ttskernels._triton.tiles import BOX_TABLE, architecture, lookup, programs  # noqa: E402
from ttskernels.attention_launches import attention_launches  # noqa: E402
from ttskernels.kv import HeadShape  # noqa: E402
from ttskernels.kv.machines import gpu_machine  # noqa: E402
from ttskernels.ops.tree_attention import tree_attention  # noqa: E402

DEVICE, DTYPE = (torch.device("cuda"), torch.bfloat16) if GPU else (torch.device("cpu"), torch.float16)


def main() -> None:
    for heads in ((28, 4, 128), (4, 2, 64)) if GPU else ((2, 1, 64),):
        trees = make_trees(DEEP, [row for row in DEEP_ROWS for _ in range(5 if GPU else 1)])
        for mode in ("separate", "chunks", "prefix") if GPU else ("chunks",):
            check(trees, heads, build_plan(trees, mode))
            print(mode, heads, "equal to the reference", flush=True)
    for shuffled in (False, True):
        tasks = check_queues((28, 4, 128) if GPU else (8, 1, 64), shuffled)
        print("pages gathered" if shuffled else "boxes of rows", tasks, "equal to the reference, twice", flush=True)


def check(trees, heads: tuple[int, int, int], plan, launches: int = 1) -> None:
    q, k, v = make(trees, *heads, DTYPE, packed=False)
    exact, _, low, _ = expected(q, k, v, getattr(plan, "buffer", plan), heads[2] ** -0.5, 0.0, 0, None, {})
    args = [t.to(DEVICE) for t in (q, k, v, plan)]
    for _ in range(launches):
        assert_within_budget(tree_attention(*args, impl="triton").cpu(), exact, low, factor=3.0)


def check_queues(heads: tuple[int, int, int], shuffled: bool) -> str:
    """Prompts of four branches each, so many that programs draw large items and small ones from their queues, in two launches
    that run at the same time; then the same again, from counters that the first left behind."""
    dim, size = heads[2], DTYPE.itemsize
    shape, arch = HeadShape(*heads, dim, size), architecture(DEVICE)
    boxes = None if shuffled else BOX_TABLE.get((arch, dim, size))
    tiles = boxes or lookup(arch, dim, dim, size)
    prompts = 5 * max(programs(DEVICE, tile, heads[1]) for tile in tiles) // (4 * heads[1]) + 1
    nodes, rows = [], []
    for root in range(0, 5 * prompts, 5):
        nodes += [(-1, 100, 0)] + [(root, 30, 0)] * 4
        rows += [(root + i, 29) for i in range(1, 5)]
    trees = make_trees(nodes, rows, shuffled=shuffled)
    plan = planned(trees, shape, gpu_machine(shape))
    large, every, launches = plan.header[25], plan.header[5], attention_launches(plan.header)
    tasks = [n * heads[1] for n in (large, every - large)]
    launched = [programs(DEVICE, tile, heads[1]) for tile in tiles]
    assert launches.straight == (not shuffled) and all(t > p for t, p in zip(tasks, launched, strict=True)), (tasks, launched)
    check(trees, heads, plan, launches=2)
    return f"{tasks[0]} large and {tasks[1]} small tasks of {launched[0]} and {launched[1]} programs"


if __name__ == "__main__":
    main()
