"""`python -m ttskernels`: which implementations can run here, and why the others cannot.

`python -m ttskernels model ...`: what a decode iteration costs at least on a GPU (roofline.py).
`python -m ttskernels machine`: measure the planner's constants of this CPU again, and keep them.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys

import torch

import ttskernels
from ttskernels import _dispatch
from ttskernels.kv import cpu_machine

SETTINGS = {
    "TTSK_CPU_ISA": "portable | avx2 | avx512 | avx512_vnni | avx512_bf16 | neon | neon_bf16: force an instruction-set level",
    "TTSK_NUM_THREADS": "threads of the CPU kernels",
    "TTSK_L1_KB": "size of a first-level data cache, else as the system tells: blocks of bf16 weights; no result depends on it",
    "TTSK_DISABLE_CPP": "1: run on the reference implementation",
    "TTSK_CACHE": "folder of converted GGUF checkpoints, calibrated weights and the planner's constants",
    "TTSK_MACHINE": "default, or a file with the planner's constants; else they are measured once",
    "TTSK_VLLM": "1: tree attention inside of vLLM's CPU engine (integrations/vllm.py)",
}
ISAS = ("portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "neon", "neon_bf16")


def report() -> list[tuple[str, str]]:
    """(what, state) lines of the environment report."""
    lines = [
        ("ttskernels", ttskernels.__version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", torch.__version__),
        ("transformers", _version("transformers")),
        ("triton", _version("triton")),
    ]
    for impl in ("cpu", "triton", "cuda", "reference"):
        reason = _dispatch.available(impl)
        state = "available" if reason is None else f"not available: {reason}"
        if impl == "reference" and _dispatch.load_extension() is not None:
            state += " (plain PyTorch: correct, slow; it serves everything here)"
        lines.append((f"impl {impl}", state))
    if _dispatch.load_extension() is None:
        library = _dispatch.library()
        supported = [isa for i, isa in enumerate(ISAS) if library.ttsk_isa_supported(i)]
        lines.append(("instruction set", f"{_dispatch.isa_name()} in use; this CPU has {', '.join(supported)}"))
        lines.append(("threads", str(library.ttsk_num_threads())))
    lines.append(("planner", "C++" if _dispatch.load_extension() is None else "NumPy"))
    lines.append(("planner costs", cpu_machine.describe()))
    lines += [(name, f"{os.environ.get(name) or 'not set'}  ({what})") for name, what in SETTINGS.items()]
    return lines


def _version(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return "not installed"
    from importlib.metadata import version

    return version(package)


def main() -> int:
    if sys.argv[1:2] == ["model"]:
        from ttskernels.roofline import main as model

        return model(sys.argv[2:])
    if sys.argv[1:2] == ["machine"]:
        if (reason := _dispatch.load_extension()) is not None:
            print(f"nothing to measure: {reason}", file=sys.stderr)
            return 1
        try:
            print(f"{cpu_machine.numbers(cpu_machine.measure_and_keep())} ({cpu_machine.machine_file()})")
        except cpu_machine.BusyError as error:
            print(f"nothing measured: {error}", file=sys.stderr)
            return 1
        return 0
    for name, state in report():
        print(f"{name:16} {state}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
