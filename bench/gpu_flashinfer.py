"""Compiles what FlashInfer's cascade needs, on a machine without a GPU: where it is measured, minutes of compiling cost more.

    python -m pip install --no-deps flashinfer-python==0.5.3 'apache-tvm-ffi<0.2' nvidia-ml-py tabulate click einops nvidia-curand
    python bench/gpu_flashinfer.py OUT --arch 9.0a --head-dims 64 128
    on the machine with the GPU:   cp -r OUT/* SITE/flashinfer/data/aot/ ; export FLASHINFER_DISABLE_JIT=1

FlashInfer looks into that folder before it compiles; with JIT disabled it says at once what is missing. Works beside any torch,
needs nvcc, ninja and, for fa3, the headers of nvidia-curand; about three minutes a backend and head size on two cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch


def stub_libraries(folder: Path) -> None:
    """Empty libraries to link against by name; the real ones are in the process that loads the result."""
    source = folder / "empty.c"
    source.write_text("")
    for name, soname in (("cudart", f"libcudart.so.{torch.version.cuda.split('.')[0]}"), ("cuda", "libcuda.so.1")):
        command = ["gcc", "-shared", f"-Wl,-soname,{soname}", "-o", folder / f"lib{name}.so", source]
        subprocess.run(command, check=True)
    os.environ["LIBRARY_PATH"] = os.pathsep.join([str(folder), os.environ.get("LIBRARY_PATH", "")])
    os.environ["FLASHINFER_EXTRA_LDFLAGS"] = "-Wl,--no-as-needed -lcudart"  # the result names it, though the stub has no symbol


def curand_headers() -> None:
    """Where the wheel is installed, its headers are found: an nvcc alone has none."""
    for folder in map(Path, sys.path):
        for found in folder.glob("nvidia/*/include/curand_kernel.h"):
            os.environ["CPATH"] = os.pathsep.join([str(found.parent), os.environ.get("CPATH", "")])
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--arch", default="9.0a")
    parser.add_argument("--cuda", default="13.0", help="of the torch that will load it")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128])
    parser.add_argument("--backends", nargs="*", default=["fa3", "fa2"], help="fa3 is what it takes by itself on a Hopper GPU")
    args = parser.parse_args()
    torch.version.cuda = args.cuda  # flags of its build; a torch for the CPU has none
    os.environ["FLASHINFER_CUDA_ARCH_LIST"] = args.arch
    with tempfile.TemporaryDirectory() as work:
        os.environ["FLASHINFER_WORKSPACE_BASE"] = work
        stub_libraries(Path(work))
        curand_headers()
        from flashinfer.jit import cascade, page
        from flashinfer.jit.attention import gen_batch_prefill_module

        specs, half = [cascade.gen_cascade_module(), page.gen_page_module()], torch.bfloat16
        for dim in args.head_dims:
            for backend in args.backends:
                specs.append(gen_batch_prefill_module(backend, half, half, half, torch.int32, dim, dim, 0, False, False, False))
        for spec in specs:
            spec.build(verbose=False)
            to = args.out / spec.name
            to.mkdir(parents=True, exist_ok=True)
            shutil.copy(spec.jit_library_path, to)
            print(to, flush=True)


if __name__ == "__main__":
    main()
