"""What is compiled of csrc, with which flags: for setup.py, and for the kernel tests that run without torch."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parent
# Object files of the extension, wherever setuptools or pip would put them: compiled once, and linked by the kernel tests too.
OBJECTS = CSRC.parent / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
VNNI = [*AVX512, "-mavx512vnni"]
# Architecture -> instruction-set level -> compiler flags; every csrc/cpu/kernels/*.cpp is compiled once per level.
ISA_FLAGS = {
    "x86_64": {
        "portable": [], "avx2": AVX2, "avx512": AVX512, "avx512_vnni": VNNI, "avx512_bf16": [*VNNI, "-mavx512bf16"]
    },
    "aarch64": {"portable": [], "neon": ["-DTTSK_NEON"], "neon_bf16": ["-DTTSK_NEON", "-march=armv8.2-a+bf16+i8mm"]},
}
ALIASES = {"AMD64": "x86_64", "arm64": "aarch64"}
COMMON = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-pthread",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
    "-Wno-psabi",
    "-Wno-unknown-warning-option",  # clang has other names
    "-ffp-contract=off",
    f"-I{CSRC / 'include'}",
    f"-I{CSRC / 'cpu'}",
]


class Unit(NamedTuple):
    """A translation unit: its source, the name of its object file, and flags beside COMMON."""

    source: Path
    stem: str
    flags: list[str]


def cpu_units(machine: str) -> list[Unit]:
    """Planner, decoder and kernels, which need no torch, for a `platform.machine()`."""
    levels = ISA_FLAGS.get(ALIASES.get(machine, machine), {"portable": []})
    units = [Unit(source, source.stem, []) for source in sorted((CSRC / "cpu").glob("*.cpp"))]
    for source in sorted((CSRC / "cpu" / "kernels").glob("*.cpp")):
        units += [Unit(source, f"{source.stem}.{isa}", [*flags, f"-DTTSK_ISA={isa}"]) for isa, flags in levels.items()]
    return units


def compile_units(units: Iterable[Unit], out: Path, cxx: list[str], headers: Iterable[Path] = ()) -> list[Path]:
    """Object files of the units in folder `out`, compiled side by side where they are older than source, headers or flags."""
    out.mkdir(parents=True, exist_ok=True)
    newest = max(path.stat().st_mtime for path in [*CSRC.rglob("*.h"), Path(__file__), *headers])

    def compile_one(unit: Unit) -> Path:
        target = out / f"{unit.stem}.o"
        if not target.exists() or target.stat().st_mtime <= max(newest, unit.source.stat().st_mtime):
            subprocess.run([*cxx, *COMMON, *unit.flags, "-c", str(unit.source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(compile_one, units))
