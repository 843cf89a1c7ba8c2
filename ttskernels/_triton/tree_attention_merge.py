"""The last step of tree attention on a GPU: a row's partial records merged, normalised and stored."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

LOG2E = tl.constexpr(1.4426950408889634)
NEG_INF = tl.constexpr(float("-inf"))


@triton.jit
def finish(
    out, lse, sinks, row, head, keep, m, l, o, v_scale, out_row, Q_HEADS: tl.constexpr, V_DIM: tl.constexpr,
):  # fmt: skip
    """Normalise and store the rows of m that `keep`; one that has seen nothing gives 0 and -inf."""
    dv = tl.arange(0, o.shape[1])
    none = m == NEG_INF
    if sinks is not None:
        sink = tl.load(sinks + head, mask=keep, other=0.0) * LOG2E
        top = tl.maximum(m, sink)
        weight = tl.exp2(m - top)
        l = l * weight + tl.exp2(sink - top)
        o = o * weight[:, None]
        m = top
    l = tl.where(none, 1.0, l)
    o = tl.where(none[:, None], 0.0, o * (v_scale / l)[:, None])
    out_at = out + row.to(tl.int64) * out_row + head * V_DIM
    tl.store(out_at[:, None] + dv[None, :], o.to(out.dtype.element_ty), mask=keep[:, None] & (dv[None, :] < V_DIM))
    tl.store(lse + row.to(tl.int64) * Q_HEADS + head, tl.where(none, NEG_INF, (m + tl.log2(l)) / LOG2E), mask=keep)


@triton.jit
def merge_kernel(
    partial_o, partial_ml, plan, sinks, v_scale,  # the last two may be None
    out, lse, out_row,
    Q_HEADS: tl.constexpr, GROUP: tl.constexpr, V_DIM: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """One (plan row, query head): its records, sixteen at a time and in the order of the merge list."""
    RECORDS: tl.constexpr = 16
    if WAITS:
        gdc_wait()
    plan_row, head = tl.program_id(0), tl.program_id(1)
    if plan_row < tl.load(plan + 4):
        indptr = plan + tl.load(plan + 20) + plan_row
        first, end = tl.load(indptr), tl.load(indptr + 1)
        if first < end:
            row = tl.load(plan + tl.load(plan + 16) + plan_row)
            slots, i = plan + tl.load(plan + 21), tl.arange(0, RECORDS)
            dv = tl.arange(0, triton.next_power_of_2(V_DIM))
            m, l = tl.full([1], NEG_INF, tl.float32), tl.zeros([1], tl.float32)
            o = tl.zeros([1, dv.shape[0]], tl.float32)
            for lo in range(first, end, RECORDS):
                have = lo + i < end
                at = tl.load(slots + lo + i, mask=have, other=0).to(tl.int64) * Q_HEADS + head
                part_m = tl.load(partial_ml + at * 2, mask=have, other=NEG_INF)
                part_l = tl.load(partial_ml + at * 2 + 1, mask=have, other=0.0)
                wanted = have[:, None] & (dv[None, :] < V_DIM)
                part_o = tl.load(partial_o + at[:, None] * V_DIM + dv[None, :], mask=wanted, other=0.0)
                top = tl.maximum(m, tl.max(part_m, 0))
                shift = tl.where(top == NEG_INF, 0.0, top)
                before, weight = tl.exp2(m - shift), tl.exp2(part_m - tl.max(shift, 0))
                l = l * before + tl.sum(part_l * weight, 0)
                o = o * before[:, None] + tl.sum(part_o * weight[:, None], 0)[None, :]
                m = top
            scale = 1.0
            if v_scale is not None:
                scale = tl.load(v_scale + head // GROUP)
            keep, heads = tl.full([1], 1, tl.int1), head + tl.zeros([1], tl.int32)
            finish(out, lse, sinks, row + tl.zeros([1], tl.int32), heads, keep, m, l, o, scale, out_row, Q_HEADS, V_DIM)
