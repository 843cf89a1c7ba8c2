"""csrc/cuda without a GPU: compiled for sm_80 and sm_90a within budgets, linked, its index arithmetic run on the host."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ttskernels import _cuda, _dispatch
from ttskernels._cuda.page_copy import pool_table
from ttskernels.errors import UnavailableError
from ttskernels.ops.page_copy import page_copy

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
MOST_REGISTERS = {"plan_advance": 40, "page_copy": 64}  # eight blocks of 256 threads fit up to 32, four up to 64


@pytest.fixture
def nvcc():
    found = shutil.which(os.environ.get("NVCC", "nvcc"))
    if found is None:
        pytest.skip("nvcc is not installed")
    return [found, "-std=c++17", "-O3", "-Xcompiler", "-fPIC", f"-I{ROOT / 'csrc' / 'include'}"]


@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_registers_and_spills(nvcc, tmp_path, source, arch):
    code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    command = [*nvcc, code, "-Xptxas", "-v,-warn-spills", "-Werror", "all-warnings", "-cubin", str(source)]
    done = subprocess.run([*command, "-o", str(tmp_path / "x.cubin")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert registers and len(spills) == len(registers)
    assert max(registers) <= MOST_REGISTERS[source.stem], f"{source.name} takes {registers} registers"
    assert all(int(n) == 0 for kernel in spills for n in kernel), f"{source.name} spills: {spills}"


def test_the_library_links(nvcc, tmp_path):
    out = tmp_path / "_C_cuda.so"
    code = "-gencode=arch=compute_90a,code=sm_90a"
    subprocess.run([*nvcc, code, "-shared", "-cudart", "static", *map(str, SOURCES), "-o", str(out)], check=True)
    lib = _cuda.open_library(out)
    assert lib.ttsk_cuda_page_copy and lib.ttsk_cuda_plan_advance


@pytest.mark.parametrize("asked, built", [("1", True), ("0", False), (None, False)])
def test_the_library_is_built_without_the_cpu_extension(tmp_path, asked, built):
    """By a compiler that only writes the file."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho made > "$2"\n')
    nvcc.chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k != "TTSK_BUILD_CUDA"} | {"TTSK_BUILD_CPP": "0", "NVCC": str(nvcc)}
    env |= {} if asked is None else {"TTSK_BUILD_CUDA": asked}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env=env, check=True)
    assert [p.name for p in tmp_path.glob("ttskernels/*")] == ["_C_cuda.so"] * built


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("dim", [128, 80, 6, 3])
@pytest.mark.parametrize("order", ["nhd", "hnd", "interleaved"])
def test_index_arithmetic_on_the_host(tmp_path_factory, dtype, dim, order):
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    built = tmp_path_factory.getbasetemp() / "host_page_copy.so"
    if not built.exists():
        source = Path(__file__).with_name("host_page_copy.cpp")
        command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Werror", f"-I{ROOT / 'csrc' / 'include'}"]
        subprocess.run([*command, str(source), "-o", str(built)], check=True)
    pools = [torch.randn(9, 16, 2, d).to(dtype) for d in (dim, dim + 1, dim)]
    if order == "hnd":
        pools = [p.transpose(1, 2).contiguous().transpose(1, 2) for p in pools]
    elif order == "interleaved":
        pools[0], pools[2] = torch.stack([pools[0], pools[2]], dim=1).unbind(1)
    pairs = torch.tensor([(0, 5, 3), (0, 6, 16), (2, 7, 1), (3, 8, 0)], dtype=torch.int32)
    want = [p.clone().contiguous() for p in pools]
    for pool in want:
        for source, target, tokens in pairs.tolist():
            pool[target, :tokens] = pool[source, :tokens]
    table = pool_table(pools)
    assert table.shape == (3, 8) and set(table[:, 6].tolist()) <= {1, 2, 4, 8, 16}
    if dim == 128:
        assert table[0, 6] == 16
    ctypes.CDLL(str(built)).copy(ctypes.c_void_p(table.data_ptr()), 3, ctypes.c_void_p(pairs.data_ptr()), len(pairs))
    for pool, expected in zip(pools, want, strict=True):
        assert torch.equal(pool.contiguous().view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    assert _dispatch.available("cuda") == "no GPU is visible to torch"
    pool = torch.zeros(1, 2, 16, 1, 8)
    with pytest.raises(UnavailableError, match="impl 'cuda' is not available: no GPU is visible to torch"):
        page_copy(pool, pool.clone(), torch.tensor([[0, 1, 3]], dtype=torch.int32), impl="cuda")
