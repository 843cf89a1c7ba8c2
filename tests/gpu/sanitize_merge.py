"""Small launches of tree attention whose rows have many partial results, for compute-sanitizer to watch.

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
from plans import build_plan, make_trees  # noqa: E402

from ttskernels.ops.tree_attention import tree_attention  # noqa: E402


def main() -> None:
    device, dtype = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float16)
    for heads in ((28, 4, 128), (4, 2, 64)) if GPU else ((2, 1, 64),):
        trees = make_trees(DEEP, [row for row in DEEP_ROWS for _ in range(5 if GPU else 1)])
        q, k, v = make(trees, *heads, dtype, packed=False)
        for mode in ("separate", "chunks", "prefix") if GPU else ("chunks",):
            plan = build_plan(trees, mode)
            exact, _, low, _ = expected(q, k, v, plan, heads[2] ** -0.5, 0.0, 0, None, {})
            args = (t.to(device) for t in (q, k, v, plan))
            assert_within_budget(tree_attention(*args, impl="triton").cpu(), exact, low, factor=3.0)
            print(mode, heads, "equal to the reference", flush=True)


if __name__ == "__main__":
    main()
