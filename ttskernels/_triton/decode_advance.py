"""The end of a decode iteration on a GPU: the stop automaton, the plan's next token, and a report for the host.

One program for all rows, so that an iteration ends without the host. A row whose state is negative has ended: it writes
no K and V, takes no token and keeps its state while the others go on. Rows from the plan's count on are padding.
"""

import triton
import triton.language as tl
from torch import Tensor

from ttskernels._triton.on_device import on_device


@triton.jit
def decode_advance_kernel(
    sampled, logprobs, next_state,                                    # inputs [rows], [rows], [states, vocab]
    plan, ids, positions, slots, draw_positions, states, iterations,  # updated
    report,                                                           # output [ring, 3, capacity]: token, logprob, state
    vocab, capacity, BAD: tl.constexpr, RING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, BLOCK)
    live = r < tl.load(plan + 4)
    state = tl.load(states + r, mask=live, other=-1)
    active = state >= 0
    token = tl.load(sampled + r, mask=active, other=-1)
    chance = tl.load(logprobs + r, mask=active, other=0.0)
    good = active & (token >= 0)
    after = tl.load(next_state + state.to(tl.int64) * vocab + token, mask=good, other=BAD)
    after = tl.where(active, after, state)

    done = tl.load(iterations)
    tl.debug_barrier()  # every thread has read it
    tl.store(iterations, done + 1)
    at = report + done % RING * 3 * capacity + r
    tl.store(at, tl.where(good, token, -1), mask=live)
    tl.store(at + capacity, chance.to(tl.int32, bitcast=True), mask=live)
    tl.store(at + 2 * capacity, after, mask=live)
    tl.store(states + r, after, mask=active)

    # PlanAdvance (csrc/include/ttskernels/plan.h), row by row
    goes_on = good & (after >= 0)
    leaf = plan + tl.load(plan + 17) + r * 4
    seg = tl.load(leaf, mask=goes_on, other=-1)
    used = tl.load(leaf + 1, mask=goes_on, other=0) + 1
    segs = plan + tl.load(plan + 19)
    onward = used >= tl.load(segs + seg * 4 + 2, mask=goes_on & (seg >= 0), other=0)
    room = goes_on & (seg >= 0) & (seg + onward.to(tl.int32) < tl.load(leaf + 2, mask=goes_on, other=0))
    seg = tl.where(onward, seg + 1, seg)
    used = tl.where(onward, 0, used)
    page, offset = tl.load(segs + seg * 4, mask=room, other=0), tl.load(segs + seg * 4 + 1, mask=room, other=0)
    position = tl.load(positions + r, mask=room, other=0) + 1
    tl.store(leaf, seg, mask=room)
    tl.store(leaf + 1, used, mask=room)
    tl.store(plan + tl.load(plan + 14) + r, position, mask=room)
    tl.store(positions + r, position, mask=room)
    tl.store(draw_positions + r, position + 1, mask=room)
    tl.store(slots + r, tl.where(room, page * tl.load(plan + 3) + offset + used, -1), mask=live)
    tl.store(ids + r, token, mask=goes_on)


@on_device
def decode_advance(
    sampled: Tensor, logprobs: Tensor, next_state: Tensor, plan: Tensor, ids: Tensor, positions: Tensor, slots: Tensor,
    draw_positions: Tensor, states: Tensor, iterations: Tensor, report: Tensor, bad_state: int,
) -> None:  # fmt: skip
    """Everything is updated in place; iteration i reports to `report[i % len(report)]`. A row whose logits were not finite
    (token -1) ends in `bad_state`."""
    ring, _, capacity = report.shape
    rows = len(ids)
    decode_advance_kernel[(1,)](
        sampled, logprobs, next_state,
        plan, ids, positions, slots, draw_positions, states, iterations,
        report,
        next_state.shape[1], capacity, bad_state, ring, max(16, triton.next_power_of_2(rows)),
        num_warps=4 if rows <= 512 else 16,
    )  # fmt: skip
