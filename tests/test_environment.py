"""The environment report, and life without the C++ extension."""

import os
import subprocess
import sys

import pytest
import torch

from ttskernels.__main__ import report
from ttskernels.errors import UnavailableError
from ttskernels.ops.rms_norm import rms_norm


def run(code: str, **env: str) -> str:
    full = {**os.environ, **env}
    return subprocess.run([sys.executable, "-c", code], env=full, capture_output=True, text=True, check=True).stdout


def test_report_names_every_implementation_with_a_reason():
    lines = dict(report())
    assert {"impl cpu", "impl triton", "impl cuda", "impl reference", "planner"} <= set(lines)
    for name, state in lines.items():
        if name.startswith("impl"):
            assert state.startswith("available") or state.startswith("not available: ")


def test_without_the_extension_everything_is_reference():
    out = run(
        "import torch, ttskernels; from ttskernels.ops.rms_norm import rms_norm; from ttskernels.__main__ import report;"
        "print(rms_norm(torch.ones(2, 4), torch.ones(4), 0.0).sum().item()); print(dict(report())['impl cpu'])",
        TTSK_DISABLE_CPP="1",
    )
    assert out.splitlines() == ["8.0", "not available: TTSK_DISABLE_CPP=1 is set"]


def test_an_explicit_implementation_runs_or_raises(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if not torch.cuda.is_available():
        with pytest.raises(UnavailableError, match="impl 'triton' is not available: (no GPU is visible|triton is not)"):
            rms_norm(torch.ones(1, 4), torch.ones(4), impl="triton")


def test_unsupported_isa_falls_back_and_says_so(cpu_extension):
    done = subprocess.run(
        [sys.executable, "-c", "import ttskernels; print(ttskernels.isa_name())"],
        env={**os.environ, "TTSK_CPU_ISA": "avx9000"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "TTSK_CPU_ISA=avx9000 is not one of" in done.stderr
    assert done.stdout.strip() in {"portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "neon", "neon_bf16"}
