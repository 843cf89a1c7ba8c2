"""Shared fixtures: seeded runs, poisoned allocations, instruction-set levels."""

import os
import platform
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning teams starve each other on a busy machine
os.environ.setdefault("TTSK_MACHINE", "default")  # plans that do not depend on what was measured here

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels then run on CPU tensors; before their import

sys.path.insert(0, str(Path(__file__).parent / "support"))

from ttskernels import _dispatch  # noqa: E402

ISAS = ("portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "neon", "neon_bf16")
X86 = platform.machine() in ("x86_64", "AMD64")


@pytest.fixture(autouse=True)
def seeded(request):
    """Every test starts from a seed of its own; torch.empty is filled with NaN, so unwritten output shows."""
    torch.manual_seed(sum(map(ord, request.node.name)))
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def sigint():
    """Ctrl-C as a terminal has it: a suite started in the background inherits an ignored SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.SIGINT
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def float8(monkeypatch):
    """Triton's interpreter converts to float8 and back as hardware does."""
    if not torch.cuda.is_available() and _dispatch.available("triton") is None:
        from float8 import exact_float8

        exact_float8(monkeypatch)


@pytest.fixture
def cpu_extension():
    reason = _dispatch.load_extension()
    if reason is not None:
        pytest.skip(f"C++ extension: {reason}")


@pytest.fixture(params=["reference", "cpu"])
def impl(request):
    """Run a test on the reference and on the C++ extension."""
    if request.param == "cpu":
        request.getfixturevalue("cpu_extension")
    return request.param


@pytest.fixture(params=[isa for isa in ISAS if X86 == isa.startswith("avx") or isa == "portable"])
def isa(request, cpu_extension):
    """Run a test once per instruction-set level this CPU has."""
    lib, before = _dispatch.library(), _dispatch.isa_name()
    if not lib.ttsk_set_isa(ISAS.index(request.param)):
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    lib.ttsk_set_isa(ISAS.index(before))
