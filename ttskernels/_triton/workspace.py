"""Scratch memory that launches on one stream share: partial records and counters."""

from dataclasses import dataclass

import torch
from torch import Tensor

COUNTERS = 8


@dataclass(frozen=True)
class Workspace:
    """`records` float32 of partial results; `counters` int32, all 0 between launches (the last to finish clears)."""

    records: Tensor
    counters: Tensor


_CACHE: dict[tuple[torch.device, int], Workspace] = {}


def workspace(device: torch.device, records: int) -> Workspace:
    """The workspace of the current stream, with room for so many float32.

    Raises:
        RuntimeError: it would have to grow while the stream is captured. The graph would then own memory that later
            launches on the stream use after the graph is gone.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    have = _CACHE.get((device, stream))
    if have is None or have.records.numel() < records:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the workspace of this stream must hold {records} float32 before a capture; "
                "run the same work once on the capturing stream first"
            )
        have = Workspace(
            torch.empty(records, dtype=torch.float32, device=device),
            torch.zeros(COUNTERS, dtype=torch.int32, device=device),
        )
        _CACHE[device, stream] = have
    return have
