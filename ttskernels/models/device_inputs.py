"""What one iteration reads: a few numbers a row and the plan, packed, so that one copy from pinned memory brings all of it."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from ttskernels.kv import plan_layout as at
from ttskernels.kv.plan import Plan


class Field(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]  # of one row
    pad: tuple  # in rows that are padding


# Padding reads token 0, writes no K and V (slot -1), and draws from row 0, whose logits are real; the draw goes nowhere.
FIELDS = {
    "ids": Field(torch.int32, (), (0,)),
    "positions": Field(torch.int32, (), (0,)),
    "slots": Field(torch.int32, (), (-1,)),
    "draw_rows": Field(torch.int32, (), (0,)),
    "draw_positions": Field(torch.int32, (), (0,)),
    "states": Field(torch.int32, (), (-1,)),
    "keys": Field(torch.int64, (), (0,)),
    "params": Field(torch.float32, (4,), (0.0, 0.0, 1.0, 0.0)),
}
ALIGN = 16  # int32: 64 bytes
START_INTS = 1 << 18
STAGES = 2


@functools.lru_cache(maxsize=64)
def layout(rows: int) -> tuple[dict[str, tuple[int, int]], int, int]:
    """(offset and int32 of each field, offset of the iteration counter, offset of the plan)."""
    offsets, first = {}, 0
    for name, field in FIELDS.items():
        ints = rows * field.dtype.itemsize // 4 * (field.shape[0] if field.shape else 1)
        offsets[name] = first, ints
        first += -(-ints // ALIGN) * ALIGN
    return offsets, first, first + ALIGN


def views(buffer: Tensor, rows: int) -> SimpleNamespace:
    """Every field `[rows, ...]`, `iterations` `[1]` and `plan` of a buffer."""
    offsets, counter, plan = layout(rows)
    fields = {
        name: buffer[first : first + ints].view(FIELDS[name].dtype).view(rows, *FIELDS[name].shape)
        for name, (first, ints) in offsets.items()
    }
    return SimpleNamespace(**fields, iterations=buffer[counter : counter + 1], plan=buffer[plan:])


class DeviceInputs:
    """The buffer on the device, and staging copies of it on the host.

    Its address stays until `reserve` has to make it larger: then what captured it must be captured again.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._allocate(START_INTS)

    def _allocate(self, ints: int) -> None:
        pinned = self.device.type == "cuda"
        self.buffer = torch.zeros(ints, dtype=torch.int32, device=self.device)
        self._staging = [[torch.zeros(ints, dtype=torch.int32, pin_memory=pinned), None] for _ in range(STAGES)]

    def reserve(self, rows: int, plan: Plan) -> bool:
        """Make room; True if the buffer has moved."""
        need = layout(rows)[2] + plan.buffer.numel()
        if need <= self.buffer.numel():
            return False
        self._allocate(1 << (need - 1).bit_length())
        return True

    def device_views(self, rows: int) -> SimpleNamespace:
        return views(self.buffer, rows)

    def plan_view(self, rows: int) -> Tensor:
        return self.buffer[layout(rows)[2] :]

    def idle(self, rows: int) -> None:
        """Padding alone, under an empty plan: whatever runs on it has nothing to do."""
        self.buffer.zero_()
        fields = self.device_views(rows)
        fields.slots.fill_(-1)
        fields.states.fill_(-1)
        fields.params[:, 2].fill_(1.0)

    def upload(self, rows: int, plan: Plan, **values: Tensor) -> None:
        """One asynchronous copy of `values` (fields, on the host; the rest is padding) and `plan` for `rows` padded rows."""
        stage = self._staging[0]
        self._staging.append(self._staging.pop(0))
        host, copied = stage
        if copied is not None:
            copied.synchronize()  # the copy before last, long done
        staged, have = views(host, rows), plan.num_rows
        values = {"positions": plan.positions, "slots": plan.slots} | values
        for name, field in FIELDS.items():
            target = getattr(staged, name)
            filled = have if name in values else 0
            if filled:
                target[:have] = values[name]
            if filled < rows:
                target[filled:] = torch.tensor(field.pad, dtype=field.dtype) if field.shape else field.pad[0]
        staged.iterations.zero_()
        ints = plan.buffer.numel()
        staged.plan[:ints] = plan.buffer
        used = layout(rows)[2] + ints
        self.buffer[:used].copy_(host[:used], non_blocking=True)
        if self.device.type == "cuda":
            stage[1] = torch.cuda.current_stream(self.device).record_event()


class LaunchPlan:
    """The plan in a `DeviceInputs`, for `rows` padded rows, as op `tree_attention` takes one.

    Launches made with it serve every later plan of at most `rows` rows and `slots` partial records.
    """

    def __init__(self, plan: Plan, buffer: Tensor, rows: int, slots: int):
        self.buffer, self.header = buffer, plan.header
        self.header[at.NUM_ROWS], self.header[at.CAP_ROWS], self.header[at.CAP_MERGES] = rows, rows, slots
