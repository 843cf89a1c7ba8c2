"""`make gpu` is ready: every part runs through the interpreter at its smallest size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run `make gpu` itself")
@pytest.mark.parametrize("part", ["tests", "attention", "decode", "prm"])
def test_dry_run(part, tmp_path):
    command = [sys.executable, str(SCRIPT), part, "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    if part != "tests":
        results = json.loads((tmp_path / f"gpu-{part}-dry-run.json").read_text())
        assert results["cases"] and results["device"].startswith("none")
