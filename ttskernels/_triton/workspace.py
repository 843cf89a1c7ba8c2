"""Scratch memory that launches on one stream share: partial records and the counters of who has arrived."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Workspace:
    """`records` float32 of partial results; `arrived` int32, all 0 between launches (the last to arrive clears)."""

    records: Tensor
    arrived: Tensor


_CACHE: dict[tuple[torch.device, int], Workspace] = {}


def workspace(device: torch.device, records: int, counters: int) -> Workspace:
    """The workspace of the current stream, at least this large.

    Raises:
        RuntimeError: it would have to grow while the stream is captured. The graph would then own memory that later
            launches on the stream use after the graph is gone.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    have = _CACHE.get((device, stream))
    if have is None or have.records.numel() < records or have.arrived.numel() < counters:
        records = max(records, 0 if have is None else have.records.numel())
        counters = max(counters, 0 if have is None else have.arrived.numel())
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the workspace of this stream must hold {records} float32 and {counters} counters before a capture; "
                "run the same work once on the capturing stream first"
            )
        have = Workspace(
            torch.empty(records, dtype=torch.float32, device=device),
            torch.zeros(counters, dtype=torch.int32, device=device),
        )
        _CACHE[device, stream] = have
    return have
