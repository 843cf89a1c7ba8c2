"""Builds ttskernels._C: planner, CPU kernels (one object per instruction-set level) and the stable-ABI torch binding.

Without a C++ compiler the package still installs and runs on the reference implementation.
TTSK_BUILD_CPP=0 skips the build; TTSK_BUILD_CPP=1 makes a failed build an error.
ttskernels/_C_cuda.so (csrc/cuda, torch-free) is built beside it where nvcc and a torch for CUDA are; TTSK_BUILD_CUDA=1
builds it with any torch, and where the other is skipped; TTSK_BUILD_CUDA=0 never.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "csrc"))
from units import OBJECTS, Unit, compile_units, cpu_units  # noqa: E402


def torch_flags() -> list[str]:
    import torch.utils.cpp_extension as ext

    includes = [f"-isystem{p}" for p in ext.include_paths()]
    return [*includes, "-DTORCH_TARGET_VERSION=0x020a000000000000"]


def all_units() -> list[Unit]:
    flags = torch_flags()
    bind = [Unit(source, f"bind.{source.stem}", flags) for source in sorted((ROOT / "csrc" / "bind").glob("*.cpp"))]
    return cpu_units(platform.machine()) + bind


CUDA_ARCHS, CUDA_LIBRARY = ("80", "90a"), "_C_cuda.so"


def find_nvcc() -> str:
    """$NVCC, the one on PATH, or that of the CUDA toolkit torch finds."""
    found = os.environ.get("NVCC") or shutil.which("nvcc")
    if found is None:
        from torch.utils.cpp_extension import CUDA_HOME

        found = f"{CUDA_HOME}/bin/nvcc" if CUDA_HOME else "nvcc"
    return found


def nvcc_command() -> list[str]:
    """Flags shared by the library and by the tests' compile checks."""
    return [find_nvcc(), "-std=c++17", "-O3", "-Xcompiler", "-fPIC", f"-I{ROOT / 'csrc' / 'include'}"]


def build_cuda(out: Path) -> None:
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHS]
    codes.append("-gencode=arch=compute_90,code=compute_90")  # later GPUs compile it when it is loaded
    fresh = out.with_suffix(".tmp")
    sources = sorted(map(str, (ROOT / "csrc" / "cuda").glob("*.cu")))
    subprocess.run([*nvcc_command(), *codes, "-shared", "-cudart", "static", *sources, "-o", str(fresh)], check=True)
    fresh.replace(out)


def wants_cuda() -> bool:
    asked = os.environ.get("TTSK_BUILD_CUDA")
    if asked is not None or os.environ.get("TTSK_BUILD_CPP") == "0":
        return asked == "1"
    import torch

    return torch.version.cuda is not None and shutil.which(nvcc_command()[0]) is not None


class BuildCpp(build_ext):
    def build_extension(self, ext: Extension) -> None:
        required, target = os.environ.get("TTSK_BUILD_CPP"), Path(self.get_ext_fullpath(ext.name))
        try:
            if required != "0":
                self.compile_and_link(target)
        except (subprocess.CalledProcessError, OSError, ImportError) as error:
            if required == "1" or "GITHUB_ACTIONS" in os.environ:
                raise
            serves = "an older one, or the slow reference implementation, serves"
            print(f"ttskernels: no new C++ extension ({error}); {serves}", file=sys.stderr)
        try:
            if wants_cuda():
                target.parent.mkdir(parents=True, exist_ok=True)
                build_cuda(target.parent / CUDA_LIBRARY)
        except (subprocess.CalledProcessError, OSError, ImportError) as error:
            if os.environ.get("TTSK_BUILD_CUDA") == "1":
                raise
            print(f"ttskernels: no CUDA library ({error}); Triton serves", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        built = (Path(self.build_lib) / "ttskernels").glob("_C.*so")
        for old in (ROOT / "ttskernels").glob("_C.*so") if any(built) else []:
            old.unlink()  # writing into it would change it under processes that run it
        super().copy_extensions_to_source()
        cuda = Path(self.build_lib) / "ttskernels" / CUDA_LIBRARY
        if cuda.exists():
            fresh = ROOT / "ttskernels" / f"{CUDA_LIBRARY}.tmp"
            shutil.copy(cuda, fresh)
            fresh.replace(fresh.with_suffix(""))

    def compile_and_link(self, target: Path) -> None:
        cxx = shlex.split(os.environ.get("CXX", "g++"))
        objects = compile_units(all_units(), OBJECTS, cxx, [ROOT / "setup.py"])
        target.parent.mkdir(parents=True, exist_ok=True)
        # Write beside and rename: a process that has the old library mapped keeps it intact.
        fresh = target.with_suffix(".tmp")
        import torch

        libs = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-ltorch"]  # found by name: already loaded
        hide = [] if sys.platform == "darwin" else ["-Wl,--exclude-libs,ALL"]
        command = [*cxx, "-shared", "-pthread", *map(str, objects), "-o", str(fresh), *hide, *libs]
        subprocess.run(command, check=True)
        fresh.replace(target)


setup(
    packages=[*find_packages(include=["ttskernels*"]), *find_packages("python")],
    package_dir={"ttskernels": "ttskernels", "ttsearch": "python/ttsearch"},
    package_data={"ttsearch.demo": ["models/*/*", "README.md"]},
    ext_modules=[Extension("ttskernels._C", sources=[], py_limited_api=True, optional=True)],
    cmdclass={"build_ext": BuildCpp},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
