"""sample against the same draw written in torch ops, on vocabularies of two small models.

Sampling runs once per decode iteration; the question is whether it stays small beside the forward pass. Logits are
random with the spread of a language model's. Ratios mean more than times on a shared machine.

    python bench/bench_sample.py [--threads N]

Prints one line per case; the last line is JSON.
"""

import argparse
import json
import statistics
import time

import torch

from ttskernels import _dispatch
from ttskernels.ops.sample import sample

PARAMS = {
    "greedy": (0.0, 0.0, 1.0, 0.0),
    "plain": (1.0, 0.0, 1.0, 0.0),
    "top_p": (0.8, 0.0, 0.95, 0.0),
    "top_k": (0.8, 20.0, 1.0, 0.0),
}


def torch_sample(logits, params):
    temperature, top_k, top_p, _ = params
    if temperature == 0:
        return logits.argmax(-1)
    p = torch.softmax(logits / temperature, -1)
    if top_k:
        values, ids = p.topk(int(top_k))
        return ids.gather(-1, torch.multinomial(values, 1))
    if top_p < 1:
        values, ids = p.sort(descending=True)
        values[values.cumsum(-1) - values > top_p] = 0
        return ids.gather(-1, torch.multinomial(values, 1))
    return torch.multinomial(p, 1)


def median_us(call, repeats=15):
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) * 1e6


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
        _dispatch.library().ttsk_set_num_threads(args.threads)
    results = []
    for vocab in (49152, 151936):
        for rows in (1, 64):
            logits = torch.randn(rows, vocab) * 2
            logits[:, :50] += 8 * torch.rand(rows, 50)
            index = torch.arange(rows, dtype=torch.int32)
            for name, params in PARAMS.items():
                table = torch.tensor([params] * rows)
                ours = median_us(lambda: sample(logits, index, index.long(), index, table))  # noqa: B023
                theirs = median_us(lambda: torch_sample(logits, params))  # noqa: B023
                results.append({"vocab": vocab, "rows": rows, "case": name, "ours_us": ours, "torch_us": theirs})
                print(f"V={vocab:6} rows={rows:2} {name:6}: {ours:8.0f} us, torch x{theirs / ours:.1f}")
    print(json.dumps({"isa": _dispatch.isa_name(), "results": results}))


if __name__ == "__main__":
    main()
