"""Kernels go to the GPU that their tensors are on, whichever one is current."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from ttskernels._triton.on_device import on_device
from ttskernels.ops.rms_norm import rms_norm


@pytest.mark.parametrize("index, entered", [(0, []), (1, [1])])
def test_the_device_of_the_first_argument_is_current_inside(monkeypatch, index, entered):
    seen = []

    @contextmanager
    def device(where):
        seen.append(where.index)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))
    assert on_device(lambda x, y, z: (x, y, z, list(seen)))(x, 1, z=2) == (x, 1, 2, entered)


@pytest.mark.parametrize("module, names", [
    ("decode_advance", ["decode_advance"]), ("linear", ["linear"]), ("page_copy", ["page_copy"]),
    ("path_aggregate", ["path_aggregate"]), ("rms_norm", ["rms_norm", "add_rms_norm"]), ("rope_append", ["rope_append"]),
    ("sample", ["sample"]), ("silu_mul", ["silu_mul"]), ("step_score", ["step_score"]), ("token_logprob", ["token_logprob"]),
    ("tree_attention", ["tree_attention"]),
])  # fmt: skip
def test_whatever_launches_goes_there(module, names):
    made = __import__(f"ttskernels._triton.{module}", fromlist=names)
    assert all(hasattr(getattr(made, name), "__wrapped__") for name in names)


def test_an_op_runs_on_another_gpu_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, weight = torch.randn(5, 64), torch.rand(64)
    expected = rms_norm(x, weight, impl="reference")
    there = rms_norm(x.to("cuda:1"), weight.to("cuda:1"), impl="triton")
    assert there.device.index == 1 and torch.allclose(there.cpu(), expected, atol=1e-5)
