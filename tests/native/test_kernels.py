"""The torch-free kernels against loops in double precision, built without torch: here, and for AArch64 under qemu."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "csrc"))
from units import ALIASES, COMMON, ISA_FLAGS, OBJECTS, Unit, compile_units, cpu_units  # noqa: E402

HERE = Path(__file__).parent
TESTS = 13  # of the program, at each level
LIBRARIES = Path("/usr/aarch64-linux-gnu")  # of the cross compiler, for qemu
CROSS = {"compiler g++-aarch64-linux-gnu": "aarch64-linux-gnu-g++", "emulator qemu-user": "qemu-aarch64"}


def program(machine: str, cxx: list[str]) -> Path:
    """The test program for a machine; objects that are up to date are kept, and are here those of the extension."""
    out = ROOT / "build" / "native" / ALIASES.get(machine, machine)
    library = OBJECTS if machine == platform.machine() else out
    objects = compile_units(cpu_units(machine), library, cxx)
    tests = [Unit(source, f"test.{source.stem}", []) for source in sorted(HERE.glob("*.cpp"))]
    objects += compile_units(tests, out, cxx, HERE.glob("*.h"))
    target = out / "kernel_tests"
    subprocess.run([*cxx, "-pthread", *map(str, objects), "-o", str(target)], check=True)
    return target


def run(command, **environment) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def native():
    cxx = shlex.split(os.environ.get("CXX", "g++"))
    if shutil.which(cxx[0]) is None:
        pytest.skip(f"no C++ compiler {cxx[0]}")
    return program(platform.machine(), cxx)


@pytest.mark.slow
def test_every_level_of_this_cpu_equals_loops_in_double(native):
    output = run([native])
    levels = {line.split()[0] for line in output.splitlines()[:-1]}
    assert levels <= set(ISA_FLAGS.get(ALIASES.get(platform.machine(), platform.machine()), ["portable"]))
    assert "portable" in levels and output.splitlines()[-1] == f"{len(levels) * TESTS} passed, 0 failed"


def test_a_forced_level_is_the_one_that_runs(native):
    output = run([native, "--isa", "portable", "rms_norm", "philox"])
    assert [line.split()[:2] for line in output.splitlines()[:-1]] == [["portable", "rms_norm"], ["portable", "philox"]]
    nothing = subprocess.run([native, "--isa", "none"], capture_output=True, text=True)
    assert nothing.returncode == 1 and nothing.stdout == "0 passed, 0 failed\n"


@pytest.mark.slow
def test_clang_understands_the_sources():
    """Of every level, without a warning."""
    if shutil.which("clang++") is None:
        pytest.skip("no clang++")
    command = ["clang++", *COMMON, "-Werror", "-fsyntax-only"]
    for unit in cpu_units(platform.machine()):
        run([*command, *unit.flags, unit.source])


@pytest.mark.slow
def test_aarch64_under_qemu():
    """The sources compile for AArch64, and its levels give what the loops give."""
    for what, command in CROSS.items():
        if shutil.which(command) is None:
            pytest.skip(f"no cross {what} ({command})")
    output = run(["qemu-aarch64", "-L", LIBRARIES, program("aarch64", ["aarch64-linux-gnu-g++"])], TTSK_EMULATED="1")
    levels = {line.split()[0] for line in output.splitlines()[:-1]}
    assert levels == {"portable", "neon", "neon_bf16"} and output.splitlines()[-1] == f"{3 * TESTS} passed, 0 failed"
