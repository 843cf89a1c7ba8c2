"""Tree attention beside torch's forms of it, every shape of the design notes, interleaved in one run.

    python bench/attention_table.py --out bench/results/attention.json
    TTSK_NUM_THREADS=1 OMP_NUM_THREADS=1 python bench/attention_table.py --methods shared flat
    python bench/attention_table.py --methods shared int16 int8

`shared` is the planner's plan, `flat` the whole path for each branch (same kernel, same pages), `int16` and `int8` the shared
plan over fixed-point pages, `gqa` is SDPA with enable_gqa on replicated KV, `folded` SDPA with the query group folded into
q_len, `flex` FlexAttention over the unique tokens with a tree mask. A round calls every method for 10 ms or once, then
times a call; medians are over rounds, and so is the ratio shared / flat, of calls of one round (pairs). Trees: see
`bench_tree_attention.tree_nodes`. % of roofline: the sum over nodes of max(flops / peak, KV bytes / read bandwidth), over our
time, both as measured before the shape (the peak: the best so far of the products which the first method is made of: float32
multiply-adds, or pairs of bf16 (*_bf16) or int16 (fixed-point pages)). A round waits while multiply-adds run at less than 85 %
of their best rate: other guests of the machine then have half a core.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from torch.nn import functional as F

import ttskernels
from ttskernels import _dispatch

sys.path.insert(0, str(Path(__file__).parent))
from bench_tree_attention import Case, flex  # noqa: E402
from conftest import peaks  # noqa: E402
from plans import build_plan  # noqa: E402

from ttskernels.layout import FIXED, from_nhd_fixed, to_nhd  # noqa: E402
from ttskernels.ops.tree_attention import tree_attention  # noqa: E402

HEADS = ((28, 4, 128), (32, 8, 128), (14, 2, 64), (9, 3, 64))
# branches, q heads, kv heads, head dim, prompt tokens, tokens behind it on each path[, tree]
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
SEARCH = [(n, *heads, 2048, 440, tree) for tree in ("beam", "dvts") for n in (16, 64) for heads in HEADS]
SEARCH += [(n, *heads, 2048, 128) for n in (16, 64) for heads in HEADS]
SEARCH += [(1, *heads, 2048, 128) for heads in HEADS] + [(16, *heads, 2048, 128, "unshared") for heads in HEADS]
SETS = {"notes": SHAPES, "search": SEARCH}
LEAST, WAITS = 0.85, 120  # of the best rate of multiply-adds; so often a round waits for it, a quarter of a second each
REST = 0.02  # seconds before a method, so that the threads of the one before have gone to sleep
WARM = 0.01  # seconds of calls that are not timed, so that its own are awake and each on its CPU
METHODS = ("shared", "flat", "int16", "int8", "gqa", "folded", "flex")


def calls(shape: tuple[int, ...], methods: list[str], shuffled: bool):
    """The calls of one shape by method, with the cases that hold their tensors."""
    sizes, kind = shape[:6], (*shape, "best-of-N")[6]
    tree, dense = Case(*sizes, torch.bfloat16, tree=kind, shuffled=shuffled), None
    made = {}
    for method in methods:
        if method == "shared":
            made[method] = lambda: tree_attention(tree.q, tree.k, tree.v, tree.plan, impl="cpu")
        elif method == "flat":  # over the same pages: another copy of them may be 10 % faster or slower
            plan = build_plan(tree.trees, "pushed")
            made[method] = lambda plan=plan: tree_attention(tree.q, tree.k, tree.v, plan, impl="cpu")
        elif method in FIXED:
            pages = from_nhd_fixed(*(t.float() for t in to_nhd(tree.k, tree.v)), FIXED[method])
            made[method] = lambda pages=pages: tree_attention(tree.q, *pages, tree.plan, impl="cpu")
        elif method == "flex":
            torch._dynamo.reset()  # a kernel for this shape, not one with symbolic sizes
            try:
                made[method] = flex(tree)
                made[method]()
            except torch._inductor.exc.InductorError as error:
                print(f"FlexAttention does not compile at {shape}: {str(error).splitlines()[0]}")
                del made[method]
        else:
            dense = dense or Case(*sizes, torch.bfloat16, shared=False, tree=kind, shuffled=shuffled)
            made[method] = torch_call(dense, method)
    return tree, made


def torch_call(case, method: str):
    k, v = case.dense()
    q = case.q[:, :, None] if method == "gqa" else case.q.view(case.q.shape[0], k.shape[1], -1, case.q.shape[2])
    return lambda: F.scaled_dot_product_attention(q, k, v, scale=case.scale, enable_gqa=method == "gqa")


def product_gflops(method: str, peak: dict[str, float]) -> float:
    pairs = method in FIXED or _dispatch.isa_name().endswith("_bf16")
    return peak["dot_gflops" if pairs else "fma_gflops"]


class Machine:
    """What it can do now, and whether it can do now what it could."""

    def __init__(self, method: str):
        self.method, self.best, self.products, self.waits = method, 0.0, 0.0, 0

    def peaks(self) -> dict[str, float]:
        peaks.cache_clear()
        now = peaks()
        self.best = max(self.best, now["fma_gflops"])
        self.products = max(self.products, product_gflops(self.method, now))
        return now

    def wait(self) -> None:
        for _ in range(WAITS):
            rate = _dispatch.library().ttsk_peak_fma_gflops()
            self.best = max(self.best, rate)
            if rate >= LEAST * self.best:
                return
            self.waits += 1
            time.sleep(0.25)


def roofline_seconds(case: Case, gflops: float, read_gbps: float) -> float:
    """Every node read once, for all rows whose path it is on."""
    (_, q_heads, dim), kv_heads, total = case.q.shape, case.k.shape[1], 0.0
    rows = Counter(node for leaf, _ in case.trees.rows for node in case.trees.path(leaf))
    for i, node in enumerate(case.trees.nodes):
        flops, moved = 4 * q_heads * dim * node.length * rows[i], 4 * kv_heads * dim * node.length
        total += max(flops / gflops, moved / read_gbps) / 1e9
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--set", choices=SETS, default="notes", help="shapes of the design notes, or of searches")
    parser.add_argument("--shapes", type=int, nargs="+", help="indices into the set")
    parser.add_argument("--in-order", action="store_true", help="pages as a new pool hands them out, not shuffled")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    machine, records = Machine(args.methods[0]), []
    peak = machine.peaks()
    print(f"peak {machine.products:.0f} GFLOP/s, read {peak['read_gbps']:.1f} GB/s, isa {_dispatch.isa_name()}")
    print("| N, heads x dim, P, S | % of roofline | GFLOP/s | pairs shared / flat | " + " | ".join(args.methods) + " |")
    print("|---" * (4 + len(args.methods)) + "|")
    chosen = SETS[args.set]
    for shape in (chosen[i] for i in args.shapes or range(len(chosen))):
        tree, made = calls(shape, args.methods, not args.in_order)
        times: dict[str, list[float]] = {method: [] for method in made}
        machine.wait()
        now, waits = machine.peaks(), machine.waits
        for round_ in range(args.rounds + 1):
            machine.wait()
            for method, call in made.items():
                time.sleep(REST)
                until = time.perf_counter() + WARM
                call()
                while time.perf_counter() < until:
                    call()
                started = time.perf_counter()
                call()
                if round_:  # the first warms up
                    times[method].append(time.perf_counter() - started)
        median = {method: statistics.median(t) for method, t in times.items()}
        base = median[args.methods[0]]
        share = 100 * roofline_seconds(tree, machine.products, now["read_gbps"]) / base
        pairs = [a / b for a, b in zip(times.get("shared", ()), times.get("flat", ()), strict=False)]
        paired = statistics.median(pairs) if pairs else None
        n, h, kv, d, p, s, kind = (*shape, "")[:7]
        others = (f"{median[m] / base:.2f} x" if m in median else "-" for m in args.methods[1:])
        cells = [f"{1e3 * base:.2f} ms", *others]
        ratio = "-" if paired is None else f"{paired:.3f}"
        name = f"{n}, {h}/{kv} x {d}, {p}, {s} {kind}".rstrip()
        cells = [name, f"{share:.0f}", f"{tree.flops / base / 1e9:.0f}", ratio, *cells]
        print("| " + " | ".join(cells) + " |", flush=True)
        records.append({
            "shape": shape, "roofline_percent": share, "paired_shared_over_flat": paired, "flops": tree.flops, "seconds": times,
            "peaks": now, "products": machine.products, "waits": machine.waits - waits,
        })  # fmt: skip
    if args.out:
        record = {
            "bench": "attention_table", "peaks": peak, "isa": _dispatch.isa_name(), "torch": torch.__version__,
            "in_order": args.in_order,
            "threads": _dispatch.library().ttsk_num_threads(), "torch_threads": torch.get_num_threads(),
            "version": ttskernels.__version__,
            "environment": {k: v for k, v in os.environ.items() if k.startswith(("TTSK", "OMP"))},
            "shapes": records,
        }  # fmt: skip
        args.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
