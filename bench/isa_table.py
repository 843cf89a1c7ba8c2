"""Tree attention at every instruction-set level of this CPU, against what that level can do at most.

    python bench/isa_table.py --out bench/results/isa.json

Shapes of workload W4: N branches of 128 tokens behind a prompt of 2,048, bf16. Each level is forced in turn, the levels
interleaved within a round; the best of the rounds counts, as of the peaks, so that other processes disturb less (the file has
every round). % of its own roofline: the sum over nodes of max(flops / the level's peak,
KV bytes / read bandwidth) over our time. Peaks are measured once a shape: the rate of the
multiply-adds that the level uses on bf16 (FMA; vdpbf16ps at avx512_bf16), and of reading 256 MiB. TTSK_MACHINE=default
keeps measured planner constants out of it.
"""

import argparse
import ctypes
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TTSK_MACHINE", "default")

import torch  # noqa: E402

from ttskernels import _dispatch  # noqa: E402
from ttskernels.__main__ import ISAS  # noqa: E402
from ttskernels.ops.tree_attention import tree_attention  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from bench_tree_attention import Case  # noqa: E402
from conftest import peaks  # noqa: E402

HEADS = [(28, 4, 128), (32, 8, 128), (14, 2, 64), (9, 3, 64)]
SHAPES = [(n, *heads, 2048, 128) for heads in HEADS for n in (16, 64)]


def floor_seconds(shape: tuple[int, ...], gflops: float, read_gbps: float) -> float:
    """Of the prompt, which all branches read, and of each branch's own tokens."""
    branches, q_heads, kv_heads, dim, prompt, suffix = shape
    nodes = [(prompt, branches), *[(suffix, 1)] * branches]
    work = [(4 * q_heads * dim * tokens * rows / gflops, 4 * kv_heads * dim * tokens / read_gbps) for tokens, rows in nodes]
    return sum(map(max, work)) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--isa", nargs="+", default=[isa for isa in ISAS if isa != "portable"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    library = _dispatch.library()
    library.ttsk_peak_dot_gflops.restype = ctypes.c_double
    levels = {isa: {"gflops": 0.0} for isa in args.isa if library.ttsk_set_isa(ISAS.index(isa))}
    torch.manual_seed(0)
    records, read = [], 0.0
    for shape in SHAPES:
        case = Case(*shape, torch.bfloat16)
        times: dict[str, list[float]] = {isa: [] for isa in levels}
        for round_ in range(args.rounds + 1):
            for isa in levels:
                library.ttsk_set_isa(ISAS.index(isa))
                tree_attention(case.q, case.k, case.v, case.plan, impl="cpu")
                started = time.perf_counter()
                tree_attention(case.q, case.k, case.v, case.plan, impl="cpu")
                if round_:  # the first warms up
                    times[isa].append(time.perf_counter() - started)
                else:
                    levels[isa]["gflops"] = max(levels[isa]["gflops"], library.ttsk_peak_dot_gflops())
        peaks.cache_clear()
        read = max(read, peaks()["read_gbps"])
        records.append({"shape": shape, "seconds": times})
    print(f"read {read:.1f} GB/s; " + ", ".join(f"{i} peak {p['gflops']:.0f} GFLOP/s" for i, p in levels.items()))
    print("| N, heads x dim | " + " | ".join(f"{isa}: % of its roofline, ms" for isa in levels) + " |")
    print("|---" * (1 + len(levels)) + "|")
    for record in records:
        n, q_heads, kv_heads, dim, *_ = record["shape"]
        best = {isa: min(times) for isa, times in record["seconds"].items()}
        floor = {isa: floor_seconds(record["shape"], level["gflops"], read) for isa, level in levels.items()}
        record["roofline_percent"] = {isa: 100 * floor[isa] / best[isa] for isa in levels}
        cells = [f"{record['roofline_percent'][isa]:.0f} %, {1e3 * best[isa]:.2f}" for isa in levels]
        print(f"| {n}, {q_heads}/{kv_heads} x {dim} | " + " | ".join(cells) + " |", flush=True)
    if args.out:
        threads = library.ttsk_num_threads()
        out = {"bench": "isa_table", "levels": levels, "read_gbps": read, "threads": threads, "shapes": records}
        args.out.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
