"""Tree attention beside torch's forms of it, every shape of the design notes, interleaved in one run.

    python bench/attention_table.py --out bench/results/attention.json
    TTSK_NUM_THREADS=1 OMP_NUM_THREADS=1 python bench/attention_table.py --methods shared flat

`shared` is the planner's plan, `flat` the prompt for each branch (same kernel), `gqa` is SDPA with enable_gqa on
replicated KV, `folded` SDPA with the query group folded into q_len, `flex` FlexAttention over the unique tokens
with a tree mask. A round calls every method twice and times the second; medians are over rounds. % of roofline:
the sum over nodes of max(flops / FMA peak, KV bytes / read bandwidth), both measured by this run, over our time.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

import ttskernels
from ttskernels import _dispatch

sys.path.insert(0, str(Path(__file__).parent))
from bench_tree_attention import Case, flex  # noqa: E402
from conftest import peaks  # noqa: E402

from ttskernels.ops.tree_attention import tree_attention  # noqa: E402

# branches, q heads, kv heads, head dim, prompt tokens, tokens of each branch
SHAPES = [
    (16, 28, 4, 128, 2048, 128),
    (16, 14, 2, 64, 2048, 128),
    (16, 9, 3, 64, 2048, 128),
    (16, 32, 32, 128, 2048, 64),
    (64, 16, 8, 128, 2048, 128),
    (64, 28, 4, 128, 2048, 128),
    (16, 28, 4, 128, 16384, 128),
    (4, 28, 4, 128, 2048, 128),
    (1, 28, 4, 128, 2048, 128),
]
METHODS = ("shared", "flat", "gqa", "folded", "flex")


def calls(shape: tuple[int, ...], methods: list[str]):
    """The calls of one shape by method, with the cases that hold their tensors."""
    tree, dense = Case(*shape, torch.bfloat16), None
    made = {}
    for method in methods:
        if method == "shared":
            made[method] = lambda: tree_attention(tree.q, tree.k, tree.v, tree.plan, impl="cpu")
        elif method == "flex":
            torch._dynamo.reset()  # a kernel for this shape, not one with symbolic sizes
            try:
                made[method] = flex(tree)
                made[method]()
            except torch._inductor.exc.InductorError as error:
                print(f"FlexAttention does not compile at {shape}: {str(error).splitlines()[0]}")
                del made[method]
        else:
            dense = dense or Case(*shape, torch.bfloat16, shared=False)
            made[method] = torch_call(dense, method)
    return tree, made


def torch_call(case, method: str):
    if method == "flat":
        return lambda: tree_attention(case.q, case.k, case.v, case.plan, impl="cpu")
    k, v = case.dense()
    q = case.q[:, :, None] if method == "gqa" else case.q.view(case.q.shape[0], k.shape[1], -1, case.q.shape[2])
    return lambda: F.scaled_dot_product_attention(q, k, v, scale=case.scale, enable_gqa=method == "gqa")


def roofline_seconds(shape: tuple[int, ...], peak: dict[str, float]) -> float:
    branches, q_heads, kv_heads, dim, prompt, suffix = shape

    def node(tokens: int, rows: int) -> float:
        flops, moved = 4 * q_heads * dim * tokens * rows, 4 * kv_heads * dim * tokens
        return max(flops / peak["fma_gflops"], moved / peak["read_gbps"]) / 1e9

    return node(prompt, branches) + branches * node(suffix, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--shapes", type=int, nargs="+", default=range(len(SHAPES)), help="indices into SHAPES")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    peak, records = peaks(), []
    print(f"FMA peak {peak['fma_gflops']:.0f} GFLOP/s, read {peak['read_gbps']:.1f} GB/s, isa {_dispatch.isa_name()}")
    print("| N, heads x dim, P, S | % of roofline | GFLOP/s | " + " | ".join(args.methods) + " |")
    print("|---" * (3 + len(args.methods)) + "|")
    for shape in (SHAPES[i] for i in args.shapes):
        tree, made = calls(shape, args.methods)
        times: dict[str, list[float]] = {method: [] for method in made}
        for round_ in range(args.rounds + 1):
            for method, call in made.items():
                call()
                started = time.perf_counter()
                call()
                if round_:  # the first warms up
                    times[method].append(time.perf_counter() - started)
        median = {method: statistics.median(t) for method, t in times.items()}
        base = median[args.methods[0]]
        share = 100 * roofline_seconds(shape, peak) / base
        n, h, kv, d, p, s = shape
        others = (f"{median[m] / base:.2f} x" if m in median else "-" for m in args.methods[1:])
        cells = [f"{1e3 * base:.2f} ms", *others]
        cells = [f"{n}, {h}/{kv} x {d}, {p}, {s}", f"{share:.0f}", f"{tree.flops / base / 1e9:.0f}", *cells]
        print("| " + " | ".join(cells) + " |", flush=True)
        records.append({"shape": shape, "roofline_percent": share, "flops": tree.flops, "seconds": times})
    if args.out:
        record = {
            "bench": "attention_table", "peaks": peak, "isa": _dispatch.isa_name(), "torch": torch.__version__,
            "threads": _dispatch.library().ttsk_num_threads(), "torch_threads": torch.get_num_threads(),
            "version": ttskernels.__version__,
            "environment": {k: v for k, v in os.environ.items() if k.startswith(("TTSK", "OMP"))},
            "shapes": records,
        }  # fmt: skip
        args.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
