"""Benchmark helpers: what the machine can do (measured once a session) and what a number means next to it.

    pytest bench --benchmark-only                        every benchmark
    pytest bench/bench_plan.py --benchmark-only          one
    pytest bench --benchmark-disable                     once each, as a test (CI)

Run on an idle machine. Each benchmark's extra_info says the bytes it must move, GB/s at the median and
percent of the measured read rate; machine_info has the commit, instruction-set level, versions and peaks.
"""

import ctypes
import functools
import importlib.metadata
import os
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import ttskernels
from ttskernels import _dispatch

ROOT = Path(__file__).parent.parent
READ_FLOATS = 1 << 26  # 256 MiB: past every cache


@functools.cache
def peaks() -> dict[str, float]:
    """`fma_gflops`, `dot_gflops` (pairs of int16 or bf16, whichever this CPU multiplies faster), `bytes_gflops` (int8) and
    `read_gbps` of all threads.

    NumPy's (lower), and only the first and the last, without the C++ extension.
    """
    data = np.ones(READ_FLOATS, np.float32)
    if _dispatch.load_extension() is None:
        lib = _dispatch.library()
        for name in ("peak_fma_gflops", "peak_dot_gflops", "peak_words_gflops", "peak_bytes_gflops", "read_gb_per_second"):
            getattr(lib, f"ttsk_{name}").restype = ctypes.c_double
        lib.ttsk_read_gb_per_second.argtypes = (ctypes.c_void_p, ctypes.c_int64)
        return {
            "fma_gflops": lib.ttsk_peak_fma_gflops(),
            "dot_gflops": max(lib.ttsk_peak_dot_gflops(), lib.ttsk_peak_words_gflops()),
            "bytes_gflops": lib.ttsk_peak_bytes_gflops(),
            "read_gbps": lib.ttsk_read_gb_per_second(data.ctypes.data, data.size),
        }
    square = np.ones((1024, 1024), np.float32)
    return {
        "fma_gflops": 2 * 1024**3 / best_seconds(lambda: square @ square) / 1e9,
        "read_gbps": data.nbytes / best_seconds(lambda: data.max()) / 1e9,
    }


def best_seconds(work, runs: int = 5) -> float:
    def once():
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return min(once() for _ in range(runs))


@pytest.fixture
def annotate(benchmark):
    """`annotate(bytes=..., flops=...)` after the run: rates at the median and percent of the peaks."""

    def add(*, num_bytes: float = 0, flops: float = 0, **extra):
        benchmark.extra_info.update(extra)
        if benchmark.stats is None:  # --benchmark-disable
            return
        ordered = sorted(benchmark.stats.stats.data)
        median = benchmark.stats.stats.median
        benchmark.extra_info["p20_us"], benchmark.extra_info["p80_us"] = (
            1e6 * ordered[int(q * (len(ordered) - 1))] for q in (0.2, 0.8)
        )
        if num_bytes:
            rate = num_bytes / median / 1e9
            benchmark.extra_info.update(
                bytes=num_bytes, gbps=rate, percent_of_read=100 * rate / peaks()["read_gbps"]
            )
        if flops:
            rate = flops / median / 1e9
            benchmark.extra_info.update(
                flops=flops, gflops=rate, percent_of_fma=100 * rate / peaks()["fma_gflops"]
            )

    return add


def pytest_benchmark_update_machine_info(config, machine_info):
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    machine_info["ttskernels"] = {
        "version": ttskernels.__version__,
        "commit": head.stdout.strip() or "unknown",
        "isa": _dispatch.isa_name() if _dispatch.load_extension() is None else "none",
        "threads": torch.get_num_threads(),
        **{name: importlib.metadata.version(name) for name in ("torch", "numpy", "transformers")},
        **peaks(),
    }


def pytest_configure(config):
    if config.getoption("benchmark_disable"):  # a test: plans that do not depend on what was measured here
        os.environ.setdefault("TTSK_MACHINE", "default")
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")
