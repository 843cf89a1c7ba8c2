"""What runs on a rented GPU: tests, and benchmarks with cold and warm caches, each part under nine minutes.

    make gpu PART=tests|attention|decode|prm|linear|tune
    python bench/gpu.py attention --tiny        a dry run: smallest sizes, the interpreter if there is no GPU

Cases that a former run of the same commit left out come first, then those that failed in it, then those that did not end: a
case is stopped when the time is up, and one that hangs and is killed holds up nothing but itself. Where git does not name the
commit, every run begins anew. After every case `<out>/gpu-<part>.json` is written and a table of it, `gpu-<part>.md`:
microseconds of CUDA-graph replays, median, p20 and p80, over inputs that the second-level cache does not hold (cold) and over
one input again and again (warm). Percent of the tree roofline, cold, is of max(unique bytes / this run's copy bandwidth,
flops / 600 TFLOP/s). Rivals that are not installed or fail get a row that says why. A dry run times nothing. Needs no network
and nothing outside of the repository; Python 3.12, torch 2.11, triton 3.6 do.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import platform
import signal
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "bench")]

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from gpu_measure import GPU, Rows, copy_bandwidth  # noqa: E402

PARTS = {
    "tests": "Tests on the device",
    "attention": "Tree attention",
    "decode": "Decode iterations",
    "prm": "PRM scoring",
    "linear": "Products of a decode iteration",
    "tune": "Tiles and plans of tree attention",
}


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def said(command: list[str]) -> str | None:
    """What a command prints; None if it is not installed or prints nothing."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def head() -> dict:
    """Where and with what the figures were taken."""
    made = {
        "device": torch.cuda.get_device_name() if GPU else "none (interpreter)",
        "torch": torch.__version__, "triton": installed("triton"), "python": platform.python_version(),
        "flashinfer": installed("flashinfer-python"), "commit": said(["git", "rev-parse", "--short", "HEAD"]),
    }  # fmt: skip
    if GPU:
        query = ["nvidia-smi", "--query-gpu=power.limit,driver_version", "--format=csv,noheader"]
        made["power limit, driver"] = said(query)
        made["copy_gb_per_second"] = round(copy_bandwidth() / 1e9)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--tiny", action="store_true", help="smallest sizes: does it run?")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--minutes", type=float, default=8.0)
    args = parser.parse_args()
    if not GPU and not args.tiny:
        parser.error("no GPU is visible to torch; --tiny runs the smallest sizes in the interpreter")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"gpu-{args.part}{'-dry-run' if args.tiny else ''}.json"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a part still ends what it has started
    rows = Rows(path, head(), args.minutes, PARTS[args.part])
    if importlib.util.find_spec(f"gpu_{args.part}") is None:
        parser.error(f"PART={args.part} needs bench/gpu_{args.part}.py, which this tree does not have")
    part = importlib.import_module(f"gpu_{args.part}")
    if hasattr(part, "run"):  # drives itself: rows(name, row), rows.unfinished_first(names), rows.out_of_time()
        part.run(rows, args.tiny)
    else:
        rows.run(part.cases(args.tiny))
    if rows.failed:
        print("failed:", ", ".join(rows.failed))
    return int(bool(rows.failed))


if __name__ == "__main__":
    sys.exit(main())
