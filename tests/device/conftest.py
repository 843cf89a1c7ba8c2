"""Tests that take `device` run on the GPU if there is one, else in Triton's interpreter, on CPU tensors (fp32 and fp16)."""

import pytest
import torch
from tiny_models import SMALL, write_tiny

from ttskernels import _dispatch


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    policy, verifier = tmp_path_factory.mktemp("policy"), tmp_path_factory.mktemp("verifier")
    write_tiny(policy, "llama", seed=1, **SMALL)
    write_tiny(verifier, "qwen3", seed=2, kind="ForTokenClassification", num_labels=2, **SMALL)
    return policy, verifier


@pytest.fixture
def device():
    reason = _dispatch.available("triton")
    if reason is not None:
        pytest.skip(f"impl triton: {reason}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the interpreter's tiny calls gain nothing from a team
    yield torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(threads)
