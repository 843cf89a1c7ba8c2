"""Tests that take `device` run on the GPU if there is one, else in Triton's interpreter, on CPU tensors (fp32 and fp16)."""

import pytest
import torch

from ttskernels import _dispatch


@pytest.fixture
def device():
    reason = _dispatch.available("triton")
    if reason is not None:
        pytest.skip(f"impl triton: {reason}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the interpreter's tiny calls gain nothing from a team
    yield torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(threads)
