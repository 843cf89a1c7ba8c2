"""Compile a Triton kernel for a GPU that is not here, and read what it costs from the compiled code."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
LANE_REGISTERS = 2048  # of a multiprocessor over all its warps: 65536 / 32, and four times 512 in gfx942


@dataclass(frozen=True)
class Compiled:
    registers: int
    spilled_bytes: int  # stack or scratch of a thread
    shared_bytes: int
    opcodes: Counter
    loads_before_wait: int | None  # of global memory, in front of the wait for earlier launches; None: it never waits
    serialized: bool  # ptxas waits for each wgmma by itself, as it cannot follow who writes their accumulators (C7515)

    def count(self, *names: str) -> int:
        return sum(n for op, n in self.opcodes.items() if op.startswith(names))


def compile_kernel(kernel, types: dict[str, str], constants: dict, target: str, warps: int, **options) -> Compiled:
    """`types`: of the run-time arguments ('*bf16', 'i32', 'fp32'); an i32 that ends in '!' is a multiple of 16."""
    names = kernel.arg_names
    missing = set(names) ^ (types.keys() | constants.keys())
    assert not missing, f"arguments given and taken differ: {sorted(missing)}"
    signature = {n: types[n].rstrip("!") if n in types else "constexpr" for n in names}
    aligned = [n for n, t in types.items() if t.startswith("*") or t.endswith("!")]
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attrs)
    made = triton.compile(source, target=TARGETS[target], options={"num_warps": warps, **options})
    if target.startswith("sm_"):
        registers, stack, opcodes = _read_cubin(made.asm["cubin"])
    else:
        registers, stack, opcodes = _read_amdgcn(made.asm["amdgcn"])
    wait = opcodes.index("ACQBULK") if "ACQBULK" in opcodes else None
    early = None if wait is None else sum(op.startswith(("LDG", "UTMALDG")) for op in opcodes[:wait])
    wgmma = any(op.startswith("HGMMA") for op in opcodes)
    serialized = wgmma and "instructions are serialized" in _ptxas_log(made.asm["ptx"], target)
    return Compiled(registers, stack, made.metadata.shared, Counter(opcodes), early, serialized)


def programs_that_fit(made: Compiled, target: str, warps: int) -> int:
    """Programs that a multiprocessor holds at once, by registers (a warp's come in units of 8 a lane) and by shared memory, of
    which NVIDIA's take 1 KiB more for each program."""
    by_registers = LANE_REGISTERS // (-(-made.registers // 8) * 8 * warps)
    more = 0 if target.startswith("gfx") else 1 << 10
    return min(by_registers, (SHARED_LIMIT[target] + more) // max(1, made.shared_bytes + more))


def _ptxas_log(ptx: str, target: str) -> str:
    from triton.backends.nvidia.compiler import get_ptxas

    ptxas = get_ptxas(int(target.removeprefix("sm_"))).path
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas, "-v", f"--gpu-name={target}a", file.name, "-o", os.devnull]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _read_cubin(cubin: bytes) -> tuple[int, int, list[str]]:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tools / name, flag, file.name], capture_output=True, text=True, check=True).stdout
            for name, flag in (("cuobjdump", "--dump-resource-usage"), ("cuobjdump", "--dump-sass"))
        )
    local = int(re.search(r"LOCAL:(\d+)", usage)[1]) + int(re.search(r"STACK:(\d+)", usage)[1])
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", sass, re.M)
    return int(re.search(r"REG:(\d+)", usage)[1]), local, opcodes


def _read_amdgcn(text: str) -> tuple[int, int, list[str]]:
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
    scratch = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1])
    return registers, scratch, re.findall(r"^\s+([vs]_\w+|ds_\w+|global_\w+|buffer_\w+)", text, re.M)
