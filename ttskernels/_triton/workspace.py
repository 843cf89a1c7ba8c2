"""Scratch memory that one thread's launches on a stream share: partial records and counters."""

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

COUNTERS = 8


@dataclass(frozen=True)
class Workspace:
    """`records` float32 of partial results; `counters` int32, all 0 between launches (the last to finish clears)."""

    records: Tensor
    counters: Tensor


class Cache(threading.local):
    """By device and stream. Between the launches of one call another thread's may come, so no two threads share."""

    def __init__(self):
        self.made: dict[tuple[torch.device, int], Workspace] = {}


_CACHE = Cache()


def workspace(device: torch.device, records: int) -> Workspace:
    """This thread's workspace for the current stream, with room for so many float32.

    Raises:
        RuntimeError: it would have to grow while the stream is captured. The graph would then own memory that later
            launches on the stream use after the graph is gone.
    """
    stream = 0
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        stream = torch.cuda.current_stream(device).cuda_stream
    have = _CACHE.made.get((device, stream))
    if have is None or have.records.numel() < records:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the workspace of this stream must hold {records} float32 before a capture; "
                "run the same work once in this thread on the capturing stream first"
            )
        have = Workspace(
            torch.empty(records, dtype=torch.float32, device=device),
            torch.zeros(COUNTERS, dtype=torch.int32, device=device),
        )
        _CACHE.made[device, stream] = have
    return have
