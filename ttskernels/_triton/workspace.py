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
    """The workspace of the current stream, at least this large. Grown outside of a graph capture: run once before."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    have = _CACHE.get((device, stream))
    if have is None or have.records.numel() < records or have.arrived.numel() < counters:
        records = max(records, 0 if have is None else have.records.numel())
        counters = max(counters, 0 if have is None else have.arrived.numel())
        have = Workspace(
            torch.empty(records, dtype=torch.float32, device=device),
            torch.zeros(counters, dtype=torch.int32, device=device),
        )
        _CACHE[device, stream] = have
    return have
