"""The end of an iteration on the device against the host's own: plans, automaton, rows that end, padding, reports."""

import pytest
import torch
from device_plans import leaves_plan

from ttskernels.kv import plan_layout as at
from ttskernels.kv.plan import Plan
from ttskernels.models.device_inputs import DeviceInputs

VOCAB, RING, CAPACITY, BAD = 40, 3, 16, -99


class Device:
    """Device inputs of a plan and the kernel, and the state of the automaton as the host follows it."""

    def __init__(self, device, plan: Plan, rows: int, table: torch.Tensor):
        self.inputs, self.rows, self.have, self.table = DeviceInputs(device), rows, plan.num_rows, table.to(device)
        self.inputs.buffer.fill_(77)  # what earlier uploads left
        self.report = torch.full((RING, 3, CAPACITY), -77, dtype=torch.int32, device=device)
        zeros = torch.zeros(self.have, dtype=torch.int32)
        self.inputs.upload(rows, plan, ids=zeros, states=zeros, draw_positions=plan.positions + 1)
        self.fields = self.inputs.device_views(rows)

    def step(self, sampled: torch.Tensor, chances: torch.Tensor) -> None:
        from ttskernels._triton.decode_advance import decode_advance

        f, device = self.fields, self.inputs.device
        poison = torch.full((self.rows - self.have,), float("nan"))
        decode_advance(
            torch.cat([sampled, torch.full((self.rows - self.have,), 5)]).int().to(device),
            torch.cat([chances, poison]).to(device), self.table, f.plan, f.ids, f.positions, f.slots,
            f.draw_positions, f.states, f.iterations, self.report, BAD,
        )  # fmt: skip

    def plan_rows(self, plan: Plan) -> torch.Tensor:
        """ROW_POS and ROW_LEAF of the device's plan, on the host."""
        on_device = self.fields.plan[: plan.buffer.numel()].cpu()
        leaf = on_device[plan.header[at.ROW_LEAF] :][: 4 * self.have].view(-1, 4)
        return torch.cat([on_device[plan.header[at.ROW_POS] :][: self.have, None], leaf], 1)


@pytest.mark.parametrize("seed", range(4))
def test_advances_as_the_host_does(device, seed):
    plan = leaves_plan(seed)
    rows = plan.num_rows + seed  # seed 0 without padding
    on_device = Device(device, plan, rows, torch.zeros(1, VOCAB, dtype=torch.int32))
    have, rng = plan.num_rows, torch.Generator().manual_seed(seed)
    for iteration in range(100):
        sampled, chances = torch.randint(0, VOCAB, (have,), generator=rng), torch.rand(have, generator=rng)
        on_device.step(sampled, chances)
        token, chance, state = on_device.report[iteration % RING].cpu()[:, :have]
        assert torch.equal(token, sampled.int()) and torch.equal(chance.view(torch.float32), chances)
        assert not state.any() and torch.equal(on_device.fields.ids.cpu()[:have], sampled.int())
        assert (on_device.report.cpu()[:, :, have:] == -77).all()
        if not plan.advance():
            break
        leaf = torch.from_numpy(plan.section(at.ROW_LEAF).copy()).view(-1, 4)
        assert torch.equal(on_device.plan_rows(plan), torch.cat([plan.positions[:, None], leaf], 1))
        for name, wanted, pad in (
            ("positions", plan.positions, 0), ("slots", plan.slots, -1), ("draw_positions", plan.positions + 1, 0)
        ):  # fmt: skip
            field = getattr(on_device.fields, name).cpu()
            assert torch.equal(field[:have], wanted) and (field[have:] == pad).all(), name
    assert 0 < iteration < 60  # it ended because a row was out of slots
    slots = on_device.fields.slots.cpu()[:have]
    assert (slots == -1).any() and slots.max() < 16 * 200  # such a row writes nothing; nothing is past the pages


def test_rows_end_one_by_one(device):
    """State 1 follows token 7, and token 9 ends a step there; token 3 ends a solution anywhere; token -1 is a bad row."""
    table = torch.zeros(2, VOCAB, dtype=torch.int32)
    table[0, 7], table[1, 9], table[:, 3] = 1, -1, -2
    plan = next(p for p in map(leaves_plan, range(99)) if p.num_rows == 4)
    on_device = Device(device, plan, 6, table)
    before = on_device.plan_rows(plan)
    tokens = torch.tensor([[7, 3, 4, -1], [9, 4, 7, 4], [9, 9, 11, 9]])
    for row in tokens:
        on_device.step(row, torch.zeros(4))
    seen = on_device.report.cpu()[:, :, :4]
    assert seen[:, 0].tolist() == [[7, 3, 4, -1], [9, -1, 7, -1], [-1, -1, 11, -1]]
    assert seen[:, 2].tolist() == [[1, -2, 0, BAD], [-1, -2, 1, BAD], [-1, -2, 0, BAD]]
    assert on_device.fields.slots.cpu()[:2].tolist() == [-1, -1] and on_device.fields.slots.cpu()[3] == -1
    assert (on_device.plan_rows(plan)[:, 0] - before[:, 0]).tolist() == [1, 0, 3, 0]
    assert on_device.fields.ids.cpu().tolist() == [7, 0, 11, 0, 0, 0]
    assert on_device.fields.iterations.item() == 3
