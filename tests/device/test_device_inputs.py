"""Packed inputs: every field where the device looks for it, padding, idle inputs, growth."""

import pytest
import torch
from device_plans import leaves_plan

from ttskernels.models import device_inputs
from ttskernels.models.device_inputs import DeviceInputs, LaunchPlan, layout


@pytest.mark.parametrize("rows", [1, 5, 16, 512])
def test_fields_are_apart_and_aligned(rows):
    offsets, counter, plan = layout(rows)
    ends = [0]
    for first, ints in offsets.values():
        assert first % 16 == 0 and first >= ends[-1]
        ends.append(first + ints)
    assert ends[-1] <= counter < plan and counter % 16 == plan % 16 == 0


def test_upload_pads_and_leaves_nothing_of_before():
    inputs, plan = DeviceInputs(torch.device("cpu")), leaves_plan(2)
    have, rows = plan.num_rows, plan.num_rows + 3
    for round in range(3):  # both staging buffers, and the first again
        inputs.buffer[: layout(rows)[2]].fill_(99)
        keys = torch.arange(have) - (1 << 62) + round
        params = torch.rand(have, 4) + round
        inputs.upload(rows, plan, ids=torch.arange(have, dtype=torch.int32) + round, keys=keys, params=params)
        fields = inputs.device_views(rows)
        assert fields.ids.tolist() == [*range(round, have + round), 0, 0, 0]
        assert fields.slots.tolist() == [*plan.slots.tolist(), -1, -1, -1]
        assert fields.positions.tolist() == [*plan.positions.tolist(), 0, 0, 0]
        assert torch.equal(fields.keys[:have], keys) and not fields.keys[have:].any()
        assert torch.equal(fields.params[:have], params) and fields.params[have:].tolist() == [[0, 0, 1, 0]] * 3
        assert fields.states.tolist() == [-1] * rows and fields.iterations.item() == 0
        assert torch.equal(fields.plan[: plan.buffer.numel()], plan.buffer)
        plan.advance()


def test_idle_inputs_have_no_rows():
    inputs, plan = DeviceInputs(torch.device("cpu")), leaves_plan(1)
    inputs.upload(8, plan, ids=torch.ones(plan.num_rows, dtype=torch.int32))
    inputs.idle(8)
    fields = inputs.device_views(8)
    assert (fields.slots == -1).all() and (fields.states == -1).all() and not fields.plan.any() and not fields.ids.any()


def test_growth_moves_the_buffer(monkeypatch):
    monkeypatch.setattr(device_inputs, "START_INTS", 1024)
    inputs, plan = DeviceInputs(torch.device("cpu")), leaves_plan(3)
    assert not inputs.reserve(4, plan)
    assert inputs.reserve(64, plan) and not inputs.reserve(64, plan)
    inputs.upload(64, plan, ids=torch.zeros(plan.num_rows, dtype=torch.int32))
    assert torch.equal(inputs.plan_view(64)[: plan.buffer.numel()], plan.buffer)


def test_a_launch_plan_promises_padded_rows_and_room():
    plan = leaves_plan(3)
    launch = LaunchPlan(plan, plan.buffer, 32, 2048)
    assert (launch.header[4], launch.header[10], launch.header[13]) == (32, 32, 2048)
    assert plan.header[4] == plan.num_rows and launch.header[3] == 16
