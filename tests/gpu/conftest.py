"""Correctness on a GPU in the dtypes that Triton's interpreter cannot do: bf16 and float8. `make gpu PART=tests` runs it.

TTSK_GPU_DRY_RUN=1 runs each test once in the interpreter, fp16 in place of bf16: does the test itself work?
"""

import os

import pytest
import torch

from ttskernels import _dispatch

DRY = os.environ.get("TTSK_GPU_DRY_RUN") == "1" and not torch.cuda.is_available()


def pytest_collection_modifyitems(config, items):
    here = [item for item in items if item.path.parent.name == "gpu"]
    if DRY:  # one parametrisation of each
        first = {item.originalname: item for item in reversed(here)}
        config.hook.pytest_deselected(items=[i for i in here if first[i.originalname] is not i])
        items[:] = [i for i in items if i not in here or first[i.originalname] is i]
    elif not torch.cuda.is_available():
        for item in here:
            item.add_marker(pytest.mark.skip(reason="no GPU is visible to torch"))


@pytest.fixture(autouse=True)
def device():
    reason = _dispatch.available("triton")
    if reason is not None:
        pytest.skip(f"impl triton: {reason}")
    return torch.device("cpu" if DRY else "cuda")


@pytest.fixture
def dtype():
    return torch.float16 if DRY else torch.bfloat16
