"""Folders of tests, and compute-sanitizer over the merge of attention's partial results, each as one case."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from gpu_measure import DID_NOT_END, GPU, Rows

ROOT = Path(__file__).parents[1]
SANITIZED = "tests/gpu/sanitize_merge.py"
SANITIZER_SEES = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else what runs past a tensor is in the next one, which is no error
LEAST_S = 20.0  # for a case that begins just before the time is up


def run(rows: Rows, tiny: bool) -> None:
    commands = {}
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *workers()]
    folders = ("gpu", "device", "triton")
    files = {p for folder in folders for p in (ROOT / "tests" / folder).glob("test_*.py")}
    others = [p for p in ROOT.glob("tests/**/test_*.py") if "mark.gpu" in p.read_text() and p not in files]
    for folder in folders:
        commands[f"tests/{folder}"] = [*pytest, f"tests/{folder}"]
    for tool in ("memcheck", "racecheck", "synccheck"):
        commands[f"compute-sanitizer {tool}, merge"] = [
            shutil.which("compute-sanitizer"), "--tool", tool, "--error-exitcode", "9", sys.executable, SANITIZED,
        ]  # fmt: skip
    commands |= {str(p.relative_to(ROOT)): [*pytest, "-m", "gpu", str(p)] for p in sorted(others)}
    if tiny:
        commands = {
            "tests/gpu": [*pytest, "tests/gpu"],
            "merge": [sys.executable, SANITIZED],
        }
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" or not GPU}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    environment |= {} if GPU else {"TTSK_GPU_DRY_RUN": "1"}
    own = {name: SANITIZER_SEES if "sanitizer" in name else {} for name in commands}
    rows.run({name: lambda n=name, c=command: step(rows, c, environment | own[n]) for name, command in commands.items()})


def workers() -> list[str]:
    """Most of the time goes to the compiler: several processes, where pytest-xdist is installed."""
    return ["-n", str(min(16, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") and GPU else []


def step(rows: Rows, command: list[str | None], environment: dict[str, str]) -> dict:
    if command[0] is None:
        return {"result": "compute-sanitizer is not installed"}
    start = time.monotonic()
    try:
        code, text = output_of(command, environment, max(LEAST_S, rows.seconds_left()))
    except subprocess.TimeoutExpired as late:
        return {"failed": f"{DID_NOT_END} in {late.timeout:.0f} s; run it alone"}
    row = {"seconds": round(time.monotonic() - start, 1)}
    lines = [line for line in text.splitlines() if line.strip()]
    said = [line for line in lines if re.search(r"\d+ (passed|failed|skipped)|[A-Z]+ SUMMARY:|\berrors?\b", line)]
    row["result"] = (said or lines or ["no output"])[-1][:200]
    if code:
        row["failed"] = f"exit {code}: " + " / ".join(lines[-12:])[-1500:]
    return row


def output_of(command: list[str], environment: dict[str, str], seconds: float) -> tuple[int, str]:
    """Exit code and output. Whatever the command has started ends with it: a process that it leaves behind would hold the GPU,
    and the output open."""
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          start_new_session=True) as process:  # fmt: skip
        try:
            text, _ = process.communicate(timeout=seconds)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, text
