"""The environment report, and life without the C++ extension."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

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


def test_without_a_compiler_a_build_succeeds_and_keeps_what_was_built(tmp_path):
    root = Path(__file__).parents[1]
    for name in ("setup.py", "pyproject.toml", "README.md", "csrc", "ttskernels", "python"):
        copy = shutil.copytree if (root / name).is_dir() else shutil.copy
        copy(root / name, tmp_path / name)
    for built in (tmp_path / "ttskernels").glob("_C*"):
        built.unlink()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    wanted = {"CXX": "env no-such-compiler", "TTSK_BUILD_CUDA": "0"}
    environment = {name: value for name, value in os.environ.items() if name != "TTSK_BUILD_CPP"} | wanted
    old = tmp_path / "ttskernels" / "_C.abi3.so"
    for before in (None, b"older"):
        if before is not None:
            old.write_bytes(before)
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "no new C++ extension" in done.stderr
        assert (old.read_bytes() if old.exists() else None) == before
    required = subprocess.run(command, cwd=tmp_path, env={**environment, "TTSK_BUILD_CPP": "1"}, capture_output=True)
    assert required.returncode != 0


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


def test_tensors_that_were_never_loaded_are_refused(cpu_extension):
    """A meta tensor among others would send the op to its fake kernel, which gives memory that nobody wrote."""
    with pytest.raises(ValueError, match="tensors of rms_norm must be on one device, got .'cpu', 'meta'"):
        rms_norm(torch.ones(2, 64), torch.ones(64, device="meta"))
    assert rms_norm(torch.ones(2, 64, device="meta"), torch.ones(64, device="meta"), impl="reference").is_meta


@pytest.mark.parametrize("threads, expected", [("3", 3), ("1000000000000", 255), ("4x", None), ("-2", None), ("", None)])
def test_threads_from_the_environment(cpu_extension, threads, expected):
    code = "import ttskernels; from ttskernels._dispatch import library; print(library().ttsk_num_threads())"
    expected = len(os.sched_getaffinity(0)) if expected is None else expected
    assert int(run(code, TTSK_NUM_THREADS=threads, OMP_NUM_THREADS="")) == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_forked_while_a_thread_is_inside_a_model_can_use_it(cpu_extension):
    code = """
import os, signal, threading, time, torch
from ttsearch.demo import policy_path
from ttskernels.kv.forest import Forest
from ttskernels.kv.plan import build_plan
from ttskernels.models import load_model
torch.set_num_threads(1)
model = load_model(policy_path(), torch.bfloat16)
def forward():
    pool = model.new_pool(64)
    forest = Forest(pool)
    node = forest.add(None, [8 + t % 24 for t in range(192)])
    forest.reserve([node], 0)
    rows = [(node, 0, 192)]
    plan, last = build_plan(forest, rows, model.config.heads), torch.tensor([191], dtype=torch.int32)
    return model.forward(torch.tensor(node.ids, dtype=torch.int32), plan, pool, last, output="logits")
expected, stop = forward(), threading.Event()
def loop():
    while not stop.is_set(): forward()
thread = threading.Thread(target=loop); thread.start()
codes = []
for i in range(8):
    time.sleep(0.003 * i)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if torch.equal(forward(), expected) else 1)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
stop.set(); thread.join()
print(codes)
"""
    assert run(code) == f"{[0] * 8}\n"


def test_unsupported_isa_falls_back_and_says_so(cpu_extension):
    done = subprocess.run(
        [sys.executable, "-c", "import ttskernels; print(ttskernels.isa_name())"],
        env={**os.environ, "TTSK_CPU_ISA": "avx9000"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "TTSK_CPU_ISA=avx9000 is not one of" in done.stderr
    assert done.stdout.strip() in {"portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "neon", "neon_bf16"}
