"""Where the seconds of this engine's call go, by part, beside what each part's arithmetic and the bytes take at the peaks.

    python bench/peers/shares.py --workload W5 --precision calibrated --out bench/results/shares.json

A process makes the call again and again while `perf record` samples it by the clock (no hardware counter is needed, which virtual
machines seldom have); its symbols are sorted into parts. "At the peak" is the arithmetic of a part over the rate measured in the
same minute (floor.py), so `at the peak / seconds` is a part's efficiency. Sampled are calls alone, after one that warms up.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from subprocess import PIPE

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from floor import Rates, Shape, job_seconds  # noqa: E402
from report import rates_of  # noqa: E402
from workloads import WORKLOADS, Workload  # noqa: E402

# The first pattern that a symbol holds names its part.
PARTS = {
    "attention": r"ScoreBlocks|ScoreGroups|WeighColumns|TileRows|MoveMaxima|MergePartial|RunAll|Deferred|TreeAttention"
    r"|Kernel<.*>::|Weigh<|TreeLayout|RunKernel",
    "products of weights": r"FixedStrip|MultiplyFixed|DotStrip|MultiplyDot|::Strip",
    "sums stored, activations": r"RunTask",
    "inputs rounded": r"FixGroups|Together<.*Linear",
    "rope, K and V stored": r"AppendRows|TurnHead|StoreHead|LoadHead|RopeAppend|RopeTable",
    "norms": r"NormRow|RmsNorm",
    "sampling": r"Sample|FindLargest|RefineLogits|TokenLogprob|StepScore",
    "waiting for the other thread": r"Team::|Barrier|TaskQueue|RunTogether|Together",
    "plans": r"Plan|Walks|Advance",
}
LINE = re.compile(r"^\s*(\d+\.\d+)%\s+(\S+)\s+\[.\]\s+(.*?)\s*$")


def part_of(library: str, symbol: str) -> str:
    if library.startswith("_C."):
        return next((part for part, pattern in PARTS.items() if re.search(pattern, symbol)), "other kernels")
    return "kernel" if library.startswith("[kernel") else "Python and libraries"


def shares(perf_report: str) -> dict[str, float]:
    """Part -> share of all samples, largest first, of `perf report --stdio -F overhead,dso,symbol`."""
    found: dict[str, float] = {}
    for line in perf_report.splitlines():
        if match := LINE.match(line):
            part = part_of(match[2], match[3])
            found[part] = found.get(part, 0.0) + float(match[1]) / 100
    total = sum(found.values())
    if not total:
        raise ValueError("perf reported no samples: needed are lines of share, library and symbol")
    return {part: share / total for part, share in sorted(found.items(), key=lambda each: -each[1])}


def at_the_peak(workload: Workload, shape: Shape, rates: Rates) -> dict[str, float]:
    """Seconds of a call's arithmetic, and of reading each forward's weights, K and V once, each as if all else were free."""
    free = math.inf
    return {
        "products of weights": job_seconds(workload, shape, Rates(rates.dense_gflops, free, free)),
        "attention": job_seconds(workload, shape, Rates(free, rates.attention_gflops, free)),
        "bytes": job_seconds(workload, shape, Rates(free, free, rates.read_gbps, rates.weight_bytes, rates.kv_bytes)),
    }


def call_repeatedly(model: str, workload: Workload, precision: str, seconds: float) -> None:
    """The sampled process: a line of JSON when it is warm, one when it is done."""
    from ours_worker import OursWorker

    worker = OursWorker()
    loaded = worker.load(model, precision, len(os.sched_getaffinity(0)), workload.context, workload.samples)

    def call(round_: int) -> float:
        prompt = workload.prompt_ids(round_)
        if workload.kind == "samples":
            return worker.generate([prompt], workload.samples, workload.tokens, round_)["seconds"]
        sizes = workload.samples, workload.width, workload.steps, workload.tokens
        return worker.search("beam_search", prompt, *sizes, round_)["seconds"]

    call(0)
    print(json.dumps({"peaks": worker.peaks(), "settings": loaded["settings"]}), flush=True)
    started, taken = time.perf_counter(), []
    while time.perf_counter() - started < seconds:
        taken.append(call(len(taken) + 1))
    print(json.dumps({"calls": taken}), flush=True)
    sys.stdin.read()  # the end of this process is not sampled


def next_line(calls: subprocess.Popen) -> dict:
    line = next((line for line in calls.stdout if line.startswith("{")), None)
    if line is None:
        raise SystemExit("the process that makes the calls ended early; its error is above")
    return json.loads(line)


def measure(model: str, workload: Workload, precision: str, seconds: float) -> dict:
    if shutil.which("perf") is None:
        raise SystemExit("perf, which samples the calls, must be on PATH and is not: install linux-perf or linux-tools")
    command = [sys.executable, __file__, "--workload", workload.name, "--precision", precision, "--model", model]
    command += ["--seconds", str(seconds), "--inside"]
    with tempfile.TemporaryDirectory() as folder, subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True) as calls:
        try:
            head = next_line(calls)
            data = str(Path(folder) / "perf.data")
            record = ["perf", "record", "-q", "-o", data, "-e", "cpu-clock", "-F", "997", "-p", str(calls.pid)]
            sampler = subprocess.Popen(record, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            taken = next_line(calls)["calls"]
            sampler.send_signal(signal.SIGINT)
            sampler.wait()
        finally:
            calls.kill()
        show = ["perf", "report", "-i", data, "--stdio", "--no-children", "-F", "overhead,dso,symbol"]
        text = subprocess.run(show, capture_output=True, text=True, check=True).stdout
    rates = rates_of(head["peaks"], "bf16" if precision.startswith("bf16") else "int8")
    shape = Shape.read(Path(model))
    return {
        "workload": workload.name, "precision": precision, "seconds": statistics.median(taken), "calls": len(taken),
        "low": min(taken), "high": max(taken), **head, "floor_seconds": job_seconds(workload, shape, rates),
        "at_the_peak_seconds": at_the_peak(workload, shape, rates), "shares": shares(text),
    }  # fmt: skip


def print_table(record: dict) -> None:
    seconds, peak = record["seconds"], record["at_the_peak_seconds"]
    print(f"\n{record['workload']}, {record['precision']}: {seconds:.2f} s ({record['low']:.2f} .. {record['high']:.2f}, "
          f"{record['calls']} calls), floor {record['floor_seconds']:.2f} s = {100 * record['floor_seconds'] / seconds:.0f} %; "
          f"bytes alone {peak['bytes']:.2f} s\n")  # fmt: skip
    print("| part | share % | seconds | at the peak s | % of the peak |")
    print("|---|---|---|---|---|")
    for part, share in record["shares"].items():
        floor = peak.get(part)
        rest = f"{floor:.2f} | {100 * floor / (share * seconds):.0f}" if floor else "|"
        print(f"| {part} | {100 * share:.1f} | {share * seconds:.2f} | {rest} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=[w for w in WORKLOADS if w != "W0"], required=True)
    parser.add_argument("--precision", default="bf16 float")
    parser.add_argument("--model", help="folder; default: the workload's, of .cache/peers (models.py writes it)")
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--out", type=Path, help="JSON; an entry of the same workload and precision is replaced")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    workload = WORKLOADS[args.workload]
    if args.model is None:
        from models import get

        args.model = str(get(workload.model, "hf"))
    if args.inside:
        return call_repeatedly(args.model, workload, args.precision, args.seconds)
    record = measure(args.model, workload, args.precision, args.seconds)
    print_table(record)
    if args.out:
        kept = json.loads(args.out.read_text()) if args.out.exists() else []
        kept = [each for each in kept if (each["workload"], each["precision"]) != (args.workload, args.precision)]
        args.out.write_text(json.dumps([*kept, record], indent=1) + "\n")


if __name__ == "__main__":
    main()
