"""Kernels compile for GPUs that are not here, within their budgets. `make gpu-compile` does all variants."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "arch, registers, warps, shared, fit",
    [("sm_90", 128, 8, 0, 2), ("sm_90", 129, 8, 0, 1), ("sm_90", 255, 4, 64 << 10, 2), ("sm_90", 100, 2, 113 << 10, 2),
     ("sm_90", 100, 2, 114 << 10, 1), ("sm_89", 64, 2, 33 << 10, 2), ("gfx942", 256, 4, 0, 2), ("gfx942", 257, 4, 0, 1),
     ("gfx942", 64, 4, 33 << 10, 1)],
)  # fmt: skip
def test_programs_that_fit_a_multiprocessor(arch, registers, warps, shared, fit):
    pytest.importorskip("triton", reason="triton is not installed")
    from aot import Compiled, programs_that_fit

    assert programs_that_fit(Compiled(registers, 0, shared, Counter(), None, False), arch, warps) == fit


@pytest.mark.slow
def test_representative_variants_stay_within_budget():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("compile_all.py")), "--ci"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) > 20, done.stderr[-2000:]
    problems = {line["variant"]: line["problems"] for line in lines if line["problems"]}
    assert not problems and done.returncode == 0
