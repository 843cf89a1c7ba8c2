"""A plan's copy on a GPU: one upload, one address, so that captured launches see later plans."""

from __future__ import annotations

import torch
from torch import Tensor

from ttskernels.attention_launches import attention_launches
from ttskernels.kv import plan_layout as at
from ttskernels.kv.plan import Plan


def _fixed(plan: Plan) -> tuple:
    """What launches that are captured keep of a plan: capacities and offsets, and how attention runs it."""
    header = plan.header
    return header[at.CAP_ROWS : at.WORKER_INDPTR + 1], attention_launches(header)


class DevicePlan:
    """Made by `Plan.to(device)`. `upload` brings the host plan's present state over, without a synchronisation."""

    def __init__(self, plan: Plan, device: torch.device | str):
        self._plan = plan
        self._host = plan.buffer.pin_memory() if torch.device(device).type == "cuda" else plan.buffer.clone()
        self.buffer = torch.empty_like(plan.buffer, device=device)
        self._copied = None
        self.upload(plan)

    def upload(self, plan: Plan) -> None:
        """Copy `plan`: the one this was made of, advanced, or another written into its buffer (`reuse`).

        Raises:
            ValueError: a plan of other capacities, or one that attention runs with other launches (large items, pages
                that do not follow each other: `attention_launches`); make a new DevicePlan.
        """
        if plan.buffer.shape != self.buffer.shape or _fixed(plan) != _fixed(self._plan):
            raise ValueError(
                "plan must have the capacities and launches of the one that was uploaded first; call plan.to(device)"
            )
        self._plan = plan
        if self._copied is not None:
            self._copied.synchronize()  # the last copy may still be reading
        self._host.copy_(plan.buffer)
        self.buffer.copy_(self._host, non_blocking=True)
        if self.buffer.is_cuda:
            self._copied = torch.cuda.current_stream(self.buffer.device).record_event()

    @property
    def header(self) -> list[int]:
        return self._plan.header

    @property
    def num_rows(self) -> int:
        return self._plan.num_rows

    @property
    def positions(self) -> Tensor:
        """`[rows]` int32 view on the device: absolute position of each row's token, caller's order."""
        return self.buffer[self.header[at.ROW_POS] :][: self.num_rows]

    @property
    def slots(self) -> Tensor:
        """`[rows]` int32 view on the device: where the row's K, V go; -1: they are there."""
        return self.buffer[self.header[at.ROW_SLOT] :][: self.num_rows]
