"""Compile variants in two processes and print a JSON line of costs for each: `compile_all.py [--ci] [WORD ...]`."""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
sys.path[:0] = [str(Path(__file__).parents[i]) for i in (0, 2)] + [str(Path(__file__).parents[1] / "support")]

from aot import SHARED_LIMIT, compile_kernel, programs_that_fit  # noqa: E402
from variants import ACCEPTED_LOCAL, variants  # noqa: E402


def cost(index: int) -> dict:
    v = variants()[index]
    line = {"variant": v.key, "problems": []}
    hidden = {"params", "options", "specialization", "backend"} & set(v.kernel.arg_names)
    if hidden:
        return line | {"problems": [f"arguments {sorted(hidden)} are hidden by local variables of Triton 3.6's launcher"]}
    try:
        made = compile_kernel(v.kernel, v.types, v.constants, v.arch, v.warps, **v.options)
    except Exception as error:  # noqa: BLE001 - whatever a compiler raises is the result
        return line | {"problems": [f"does not compile: {type(error).__name__}: {str(error)[:300]}"]}
    line |= {"registers": made.registers, "spilled_bytes": made.spilled_bytes, "shared_bytes": made.shared_bytes}
    line["matrix_ops"] = {op: made.count(op) for op in ("HGMMA", "HMMA", "UTC", "v_mfma") if made.count(op)}
    accepted = next((n for start, n in ACCEPTED_LOCAL.items() if v.name.startswith(start)), 0)
    if made.spilled_bytes > accepted:
        line["problems"].append(f"spills {made.spilled_bytes} bytes of a thread, accepted {accepted}")
    if made.shared_bytes > SHARED_LIMIT[v.arch]:
        line["problems"].append(f"takes {made.shared_bytes} bytes of shared memory of {SHARED_LIMIT[v.arch]}")
    fit = programs_that_fit(made, v.arch, v.warps)
    if v.programs > fit:
        line["problems"].append(f"is launched with {v.programs} programs a multiprocessor, {fit} fit")
    if made.serialized:
        line["problems"].append("ptxas serializes its wgmma instructions")
    if v.waits_first and made.loads_before_wait != 0:
        line["problems"].append(f"must wait for earlier launches before it reads, has {made.loads_before_wait} loads before")
    line["problems"] += [f"has no {op}" for op in v.matrix_ops if not made.count(op)]
    return line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ci", action="store_true", help="the representative set that CI compiles")
    parser.add_argument("words", nargs="*", help="only variants whose name holds every word")
    args = parser.parse_args()
    picked = [
        i for i, v in enumerate(variants()) if (v.in_ci or not args.ci) and all(w in v.key for w in args.words)
    ]
    failed = 0
    with concurrent.futures.ProcessPoolExecutor(max_workers=2) as pool:
        for line in pool.map(cost, picked):
            failed += bool(line["problems"])
            print(json.dumps(line), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
