"""The shipped models' table: accuracy by strategy, budget and level, with 95 % intervals and paired bootstraps.

    python -m ttsearch.demo test > runs/demo-test.jsonl
    ttsearch evaluate runs/demo-test.jsonl --strategy greedy --strategy majority --strategy best_of_n \
        --strategy beam_search --strategy dvts --n 4 --n 16 --n 64 --temperature 1.0 --max-tokens 200 --results runs/demo
    python bench/demo_table.py runs/demo bench/results/demo.json

pass@1 is the mean over the samples of the largest majority run, its interval over problems.
"""

import json
import sys
from pathlib import Path

import numpy as np
from ttsearch.report import wilson


def load(path: Path) -> dict[str, dict]:
    return {r["id"]: r for r in map(json.loads, path.read_text().splitlines())}


def paired(a: dict, b: dict, rounds: int = 10_000) -> tuple[float, float, float]:
    """Mean difference of correctness a - b in points and its 95 % bootstrap interval, over the same problems."""
    ids = sorted(a.keys() & b.keys())
    difference = np.array([a[i]["correct"] - b[i]["correct"] for i in ids], dtype=float) * 100
    draws = np.random.default_rng(0).integers(0, len(ids), (rounds, len(ids)))
    low, high = np.percentile(difference[draws].mean(1), [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    runs = {path.stem: load(path) for path in sorted(folder.glob("*.jsonl"))}
    total = max(len(run) for run in runs.values())
    runs = {name: run for name, run in runs.items() if len(run) == total}
    rows = []
    big = runs[max((n for n in runs if n.startswith("majority")), key=lambda n: int(n.split("-n")[1]))]
    shares = np.array([np.mean([c["answer"] == r["gold"] for c in r["candidates"]]) for r in big.values()])
    half = 1.96 * shares.std(ddof=1) / len(shares) ** 0.5
    rows.append({"strategy": "pass@1", "n": 1, "accuracy": shares.mean() * 100, "low": (shares.mean() - half) * 100,
                 "high": (shares.mean() + half) * 100})  # fmt: skip
    for name, run in runs.items():
        strategy, _, n = name.partition("-n")
        correct = [r["correct"] for r in run.values()]
        low, high = wilson(sum(correct), len(correct))
        levels = sorted({r["level"] for r in run.values()})
        costs = [r["cost"] for r in run.values()]
        rows.append({
            "strategy": strategy, "n": int(n or 1), "problems": len(run), "accuracy": 100 * np.mean(correct),
            "low": 100 * low, "high": 100 * high,
            "by_level": [100 * np.mean([r["correct"] for r in run.values() if r["level"] == level]) for level in levels],
            "policy_tokens_decoded": np.mean([c["policy"]["tokens_decoded"] for c in costs]),
            "verifier_tokens": np.mean([c["verifier"]["tokens_prefilled"] for c in costs]),
            "gflop": np.mean([c["flops"] for c in costs]) / 1e9,
            "voted": np.mean([r["num_voted"] for r in run.values()]),
        })  # fmt: skip
    gains = {
        f"{a} - {b}": paired(runs[a], runs[b])
        for a, b in (("best_of_n-n16", "majority-n16"), ("beam_search-n16", "majority-n16"), ("dvts-n16", "majority-n16"),
                     ("majority-n16", "greedy"), ("beam_search-n64", "majority-n64"))
        if a in runs and b in runs
    }  # fmt: skip
    out.write_text(
        json.dumps({"problems": total, "rows": rows, "paired_points": gains}, indent=1, default=float) + "\n"
    )
    order = ["pass@1", "greedy", "majority", "best_of_n", "beam_search", "dvts"]
    print("| strategy | N | % right (95 %) | level 1 / 2 / 3 / 4 / 5 | tokens decoded | verifier tokens | GFLOP |")
    print("|---|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda r: (order.index(r["strategy"]), r["n"])):
        cells = [row["strategy"], row["n"], f"{row['accuracy']:.1f} ({row['low']:.1f} to {row['high']:.1f})"]
        if "by_level" in row:
            cells += [" / ".join(f"{x:.0f}" for x in row["by_level"]), f"{row['policy_tokens_decoded']:.0f}"]
            cells += [f"{row['verifier_tokens']:.0f}", f"{row['gflop']:.2f}"]
        print("| " + " | ".join(map(str, [*cells, *[""] * (7 - len(cells))])) + " |")
    for name, (mean, low, high) in gains.items():
        print(f"{name}: {mean:+.1f} points ({low:+.1f} to {high:+.1f})")


if __name__ == "__main__":
    main()
