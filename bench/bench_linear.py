"""linear against torch.nn.functional.linear (bf16 and fp32), on the layers of two small models.

Decode (few rows) is bound by reading the weights, prefill and wide batches by multiply-adds. Weights rotate through at
least 256 MB, so that none stays in a cache, and the variants take turns. Ratios mean more than times on a shared
machine: medians with p20 and p80.

    python bench/bench_linear.py [--quick] [--threads N]

Prints one line per shape; the last line is JSON.
"""

import argparse
import json
import statistics
import time

import torch
from torch.nn.functional import linear as torch_linear

from ttskernels import _dispatch
from ttskernels.ops.linear import linear, linear_pack

SHAPES = {
    "SmolLM2-135M": [(960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576)],
    "Qwen2.5-0.5B": [(1152, 896), (896, 896), (9728, 896), (896, 4864), (151936, 896)],
}
ROWS = (1, 4, 16, 64, 256)


def copies(n, k):
    return max(1, min(64, (256 << 20) // (n * k * 2)))


def time_variants(variants, repeats):
    """Seconds of one call of each variant, `repeats` samples, taking turns."""
    samples = {name: [] for name in variants}
    for i in range(repeats + 1):
        for name, call in variants.items():
            start = time.perf_counter()
            call(i)
            samples[name].append(time.perf_counter() - start)
    return {name: sorted(times[1:]) for name, times in samples.items()}


def bench(n, k, rows, repeats):
    weights = [torch.randn(n, k, dtype=torch.bfloat16) for _ in range(copies(n, k))]
    packed = [linear_pack(w, impl="cpu") for w in weights]
    wide = [w.float() for w in weights[: max(1, len(weights) // 2)]]
    x = torch.randn(rows, k, dtype=torch.bfloat16)
    xf = x.float()
    variants = {
        "ours": lambda i: linear(x, packed[i % len(packed)]),
        "torch_bf16": lambda i: torch_linear(x, weights[i % len(weights)]),
        "torch_fp32": lambda i: torch_linear(xf, wide[i % len(wide)]),
    }
    return time_variants(variants, repeats)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="two rows counts, SmolLM2 only")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=25)
    args = parser.parse_args()
    lib = _dispatch.library()
    if args.threads:
        torch.set_num_threads(args.threads)
        lib.ttsk_set_num_threads(args.threads)
    results = []
    for model, shapes in SHAPES.items():
        if args.quick and model != "SmolLM2-135M":
            continue
        for n, k in shapes:
            for rows in (1, 64) if args.quick else ROWS:
                times = bench(n, k, rows, args.repeats)
                middle = {name: statistics.median(t) for name, t in times.items()}
                ours = times["ours"]
                row = {
                    "model": model, "n": n, "k": k, "rows": rows,
                    "ours_us": middle["ours"] * 1e6,
                    "p20_us": ours[len(ours) // 5] * 1e6, "p80_us": ours[len(ours) * 4 // 5] * 1e6,
                    "gflops": 2 * n * k * rows / middle["ours"] / 1e9, "weight_gb_s": 2 * n * k / middle["ours"] / 1e9,
                    "vs_torch_bf16": middle["torch_bf16"] / middle["ours"],
                    "vs_torch_fp32": middle["torch_fp32"] / middle["ours"],
                }  # fmt: skip
                results.append(row)
                print(
                    f"{model} {k:5}->{n:6} M={rows:3}: {row['ours_us']:8.0f} us, {row['gflops']:6.0f} GFLOP/s, "
                    f"{row['weight_gb_s']:5.1f} GB/s, torch bf16 x{row['vs_torch_bf16']:.2f}, "
                    f"fp32 x{row['vs_torch_fp32']:.2f}"
                )
    print(json.dumps({"isa": _dispatch.isa_name(), "threads": lib.ttsk_num_threads(), "results": results}))


if __name__ == "__main__":
    main()
