"""Triton launches on the current GPU, whichever one its tensors are on."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def on_device(launch: Callable) -> Callable:
    """Decorates what launches kernels: inside, the GPU of the first argument (a tensor) is the current one."""

    @functools.wraps(launch)
    def launch_there(first: Tensor, *args, **kwargs):
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return launch(first, *args, **kwargs)
        with torch.cuda.device(first.device):
            return launch(first, *args, **kwargs)

    return launch_there
