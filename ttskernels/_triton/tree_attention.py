"""Tree attention on a GPU: one persistent launch over a plan's items, partials merged by the last to arrive.

Program (queue, kv head) runs the items of its queue for its head. A tile is up to LARGE_M (row, query head of the
group) pairs, SMALL_M where an item has no more (a leaf): K and V stream past it in tiles of BLOCK_N tokens, gathered
from pages by index, or as boxes of rows (TMA) where a partial's pages follow each other. Partials, their order and their
arithmetic are those of csrc/include/ttskernels/plan.h.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ttskernels._triton.tiles import BOX_TABLE, Tiles, architecture, choose_tiles, default_queues
from ttskernels._triton.workspace import workspace

LOG2E = tl.constexpr(1.4426950408889634)
NEG_INF = tl.constexpr(float("-inf"))


@triton.jit
def merge_state(m, l, o, part_m, part_l, part_o):
    """(maximum in log2 units, denominator, unnormalised output) of two sets of tokens; -inf is the empty one."""
    top = tl.maximum(m, part_m)
    shift = tl.where(top == NEG_INF, 0.0, top)
    a, b = tl.exp2(m - shift), tl.exp2(part_m - shift)
    return top, l * a + part_l * b, o * a[:, None] + part_o * b[:, None]


@triton.jit
def soften(s, m, first, last, token, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr):
    """Weights of one tile of scores in log2 units, rows seeing tokens first .. last: (weights, scale of before, maximum)."""
    if SOFTCAP > 0.0:
        e = tl.exp2(tl.abs(s) * (-2.0 * LOG2E / SOFTCAP))
        s = tl.where(s < 0, -SOFTCAP, SOFTCAP) * (1.0 - e) / (1.0 + e) * LOG2E
    seen = token[None, :] <= last[:, None]
    if WINDOWED:
        seen = seen & (token[None, :] >= first[:, None])
    s = tl.where(seen, s, NEG_INF)
    top = tl.maximum(m, tl.max(s, 1))
    shift = tl.where(top == NEG_INF, 0.0, top)
    return tl.exp2(s - shift[:, None]), tl.exp2(m - shift), top


@triton.jit
def attend_extent(
    q, m, l, o, k_rows, v_rows, row0, k_column, v_column, pos0, lo, hi, first, last, qk_scale,
    WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds whole tiles [lo, hi) of a partial whose token t is row row0 + t of the pool, by tensor descriptors."""
    n = tl.arange(0, BLOCK_N)
    for t in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
        k = k_rows.load([row0 + t, k_column])
        s = tl.dot(q, k.to(q.dtype).T, input_precision="ieee") * qk_scale
        p, alpha, m = soften(s, m, first - pos0, last - pos0, t + n, WINDOWED, SOFTCAP)
        v = v_rows.load([row0 + t, v_column])
        o = tl.dot(p.to(q.dtype), v.to(q.dtype), o * alpha[:, None], input_precision="ieee")
        l = l * alpha + tl.sum(p, 1)
    return m, l, o


@triton.jit
def attend_partial(
    q, m, l, o, k_base, v_base, segs, seg, offset, pos0, lo, hi, first, last, qk_scale,
    k_page, k_slot, v_page, v_slot,
    WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds tokens [lo, hi) of one partial to a state (m, l, o) whose rows see positions first .. last."""
    BLOCK_D: tl.constexpr = q.shape[1]
    BLOCK_V: tl.constexpr = triton.next_power_of_2(V_DIM)
    n, d, dv = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    lower, upper = first - pos0, tl.minimum(last - pos0, hi - 1)
    for t in tl.range(lo // BLOCK_N * BLOCK_N, hi, BLOCK_N, num_stages=STAGES):
        token = t + n
        live = token < hi  # the rest of the tile is not read, nor what comes before lo
        at = offset + token  # a partial's segments are page pieces, all but the first from slot 0 on
        if WINDOWED:
            at = offset + tl.maximum(token, lo)
        page = tl.load(segs + (seg + at // PAGE_SIZE) * 4, mask=live, other=0).to(tl.int64)
        slot = at % PAGE_SIZE
        k_at = k_base + page * k_page + slot * k_slot
        k = tl.load(k_at[None, :] + d[:, None], mask=live[None, :] & (d[:, None] < HEAD_DIM), other=0.0)
        s = tl.dot(q, k.to(q.dtype), input_precision="ieee") * qk_scale
        p, alpha, m = soften(s, m, lower, upper, token, WINDOWED, SOFTCAP)
        v_at = v_base + page * v_page + slot * v_slot
        v = tl.load(v_at[:, None] + dv[None, :], mask=live[:, None] & (dv[None, :] < V_DIM), other=0.0)
        o = tl.dot(p.to(q.dtype), v.to(q.dtype), o * alpha[:, None], input_precision="ieee")
        l = l * alpha + tl.sum(p, 1)
    return m, l, o


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
def merge_records(
    partial_o, partial_ml, merge_slots, count, head, Q_HEADS: tl.constexpr, V_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The first `count` records of each row's `merge_slots`, merged root to leaf."""
    BLOCK_V: tl.constexpr = triton.next_power_of_2(V_DIM)
    dv = tl.arange(0, BLOCK_V)
    m = tl.full([BLOCK_M], NEG_INF, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    o = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for i in range(tl.max(count)):
        have = i < count
        at = tl.load(merge_slots + i, mask=have, other=0).to(tl.int64) * Q_HEADS + head
        part_m = tl.load(partial_ml + at * 2, mask=have, other=NEG_INF, cache_modifier=".cg")
        part_l = tl.load(partial_ml + at * 2 + 1, mask=have, other=0.0, cache_modifier=".cg")
        full = (part_m > NEG_INF)[:, None] & (dv[None, :] < V_DIM)
        part_o = tl.load(partial_o + at[:, None] * V_DIM + dv[None, :], mask=full, other=0.0, cache_modifier=".cg")
        m, l, o = merge_state(m, l, o, part_m, part_l, part_o)
    return m, l, o


@triton.jit
def run_tile(
    q, k_base, v_base, k_rows, v_rows, k_column, v_column, plan, sinks, out, lse, partial_o, partial_ml, arrived,
    item, m0, kv_head, qk_scale, v_scale, window, q_row, q_head, k_page, k_slot, v_page, v_slot, out_row,
    Q_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(row, query head) pairs m0 .. m0 + BLOCK_M - 1 of one item, over all its partials."""
    BLOCK_D: tl.constexpr = triton.next_power_of_2(HEAD_DIM)
    BLOCK_V: tl.constexpr = triton.next_power_of_2(V_DIM)
    GATHER_STAGES: tl.constexpr = STAGES if k_rows is None else 1
    SCAN: tl.constexpr = triton.next_power_of_2(512 // PAGE_SIZE + 3)  # segments of a partial, and the next's first
    row_lo, row_n = tl.load(item), tl.load(item + 1)
    seg, seg_n = tl.load(item + 2), tl.load(item + 3)
    pos, slot, flags = tl.load(item + 4), tl.load(item + 5), tl.load(item + 6)
    segs = plan + tl.load(plan + 19)
    pair = m0 + tl.arange(0, BLOCK_M)
    valid = pair < row_n * GROUP
    plan_row, head = row_lo + pair // GROUP, kv_head * GROUP + pair % GROUP
    row = tl.load(plan + tl.load(plan + 16) + plan_row, mask=valid, other=0)
    last = tl.load(plan + tl.load(plan + 14) + row, mask=valid, other=-1)
    end = tl.max(last) + 1
    first, begin = 0, 0
    if WINDOWED:
        first = tl.where(last >= window, last - window + 1, 0)
        begin = tl.min(tl.where(valid, first, end))
    d, dv, s = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V), tl.arange(0, SCAN)
    q_at = q + row.to(tl.int64) * q_row + head * q_head
    q_tile = tl.load(q_at[:, None] + d[None, :], mask=valid[:, None] & (d[None, :] < HEAD_DIM), other=0.0)

    fold = ((flags & 1) != 0) | (slot < 0)
    m = tl.full([BLOCK_M], NEG_INF, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    o = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    record = slot.to(tl.int64) + pair // GROUP
    seg_end, slots_written = seg + seg_n, 0
    while seg < seg_end:
        inside = seg + s < seg_end
        starts = tl.load(segs + (seg + s) * 4 + 3, mask=inside & (s > 0), other=1)
        pieces = tl.min(tl.where((s > 0) & (starts != 0), s, SCAN))
        tokens = tl.sum(tl.load(segs + (seg + s) * 4 + 2, mask=inside & (s < pieces), other=0))
        lo, hi = tl.maximum(begin - pos, 0), tl.minimum(end - pos, tokens)
        hi = tl.where(lo < hi, hi, 0)  # nothing to see: no tile
        if k_rows is not None:
            page0 = tl.load(segs + seg * 4)
            pages = tl.load(segs + (seg + s) * 4, mask=inside & (s < pieces), other=0)
            straight = tl.sum(((s < pieces) & (pages != page0 + s)).to(tl.int32)) == 0
            straight = straight & (lo % BLOCK_N == 0)
            whole = tl.where(straight, lo + tl.maximum(hi - lo, 0) // BLOCK_N * BLOCK_N, lo)
            row0 = page0 * PAGE_SIZE + tl.load(segs + seg * 4 + 1)
            m, l, o = attend_extent(q_tile, m, l, o, k_rows, v_rows, row0, k_column, v_column, pos, lo, whole, first, last,
                                    qk_scale, WINDOWED, SOFTCAP, BLOCK_N, STAGES)  # fmt: skip
            lo = whole
        # Beside boxes, gathering is for ends and for pages that do not follow each other: no pipeline, fewer registers.
        m, l, o = attend_partial(
            q_tile, m, l, o, k_base, v_base, segs, seg, tl.load(segs + seg * 4 + 1), pos, lo, hi, first, last, qk_scale,
            k_page, k_slot, v_page, v_slot, WINDOWED, SOFTCAP, PAGE_SIZE, HEAD_DIM, V_DIM, BLOCK_N, GATHER_STAGES,
        )  # fmt: skip
        seg += pieces
        pos += tokens
        if (slot >= 0) & ((seg >= seg_end) | (not fold)):
            at = record * Q_HEADS + head
            tl.store(partial_ml + at * 2, m, mask=valid)
            tl.store(partial_ml + at * 2 + 1, l, mask=valid)
            tl.store(partial_o + at[:, None] * V_DIM + dv[None, :], o, mask=valid[:, None] & (dv[None, :] < V_DIM))
            record += row_n
            slots_written += 1
            m = tl.full([BLOCK_M], NEG_INF, tl.float32)
            l = tl.zeros([BLOCK_M], tl.float32)
            o = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)

    keep = valid
    if slot >= 0:
        indptr = plan + tl.load(plan + 20) + plan_row
        merge_lo = tl.load(indptr, mask=valid, other=0)
        expected = tl.load(indptr + 1, mask=valid, other=0) - merge_lo
        count_at = arrived + plan_row.to(tl.int64) * Q_HEADS + head
        tl.debug_barrier()  # every thread's records are written before the release
        before = tl.atomic_add(count_at, slots_written, mask=valid, sem="acq_rel")
        keep = valid & (before + slots_written == expected)
        tl.debug_barrier()  # and no thread reads records before the acquire
        tl.store(count_at, 0, mask=keep)  # ready for the next launch
        merge_slots = plan + tl.load(plan + 21) + merge_lo
        m, l, o = merge_records(partial_o, partial_ml, merge_slots, tl.where(keep, expected, 0), head,
                                Q_HEADS, V_DIM, BLOCK_M)  # fmt: skip
    if tl.max(keep.to(tl.int32)) > 0:
        row = tl.load(plan + tl.load(plan + 16) + plan_row, mask=keep, other=0)  # again: no register for it meanwhile
        finish(out, lse, sinks, row, head, keep, m, l, o, v_scale, out_row, Q_HEADS, V_DIM)


@triton.jit
def clear_uncovered_rows(
    out, lse, plan, queue, num_queues, kv_head, out_row,
    Q_HEADS: tl.constexpr, GROUP: tl.constexpr, V_DIM: tl.constexpr,
):  # fmt: skip
    """0 and -inf for the rows of no item (header field 23 counts them; the planner makes none)."""
    BLOCK: tl.constexpr = 64
    rows, num_items = tl.load(plan + 4), tl.load(plan + 5)
    items, indptr = plan + tl.load(plan + 18), plan + tl.load(plan + 20)
    g, dv = tl.arange(0, triton.next_power_of_2(GROUP)), tl.arange(0, triton.next_power_of_2(V_DIM))
    for r in range(queue, rows, num_queues):
        if tl.load(indptr + r) == tl.load(indptr + r + 1):
            covered = 0
            for i in range(0, num_items, BLOCK):
                at = i + tl.arange(0, BLOCK)
                lo = tl.load(items + at * 8, mask=at < num_items, other=rows)
                n = tl.load(items + at * 8 + 1, mask=at < num_items, other=0)
                covered += tl.sum(((lo <= r) & (r < lo + n)).to(tl.int32))
            if covered == 0:
                row = tl.load(plan + tl.load(plan + 16) + r).to(tl.int64)
                head = kv_head * GROUP + g
                zero = tl.zeros([g.shape[0], dv.shape[0]], out.dtype.element_ty)
                tl.store(out + row * out_row + head[:, None] * V_DIM + dv[None, :], zero,
                         mask=(g[:, None] < GROUP) & (dv[None, :] < V_DIM))  # fmt: skip
                tl.store(lse + row * Q_HEADS + head, tl.full([g.shape[0]], NEG_INF, tl.float32), mask=g < GROUP)


@triton.jit
def tree_attention_kernel(
    q, k_pages, v_pages, k_rows, v_rows, plan, sinks, k_scale, v_scale,  # inputs; descriptors and the last three may be None
    out, lse,                                            # outputs [rows, q_heads, v_dim], [rows, q_heads]
    partial_o, partial_ml, arrived,                      # workspace; arrived is all 0 before and after
    scale, window, num_queues,
    q_row, q_head, k_page, k_slot, k_head, v_page, v_slot, v_head, out_row,  # strides in elements
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr,
    SMALL_M: tl.constexpr, LARGE_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = Q_HEADS // KV_HEADS
    kv_head, queue = tl.program_id(0) % KV_HEADS, tl.program_id(0) // KV_HEADS
    k_base = k_pages + kv_head.to(tl.int64) * k_head
    v_base = v_pages + kv_head.to(tl.int64) * v_head
    k_column, v_column = kv_head * HEAD_DIM, kv_head * V_DIM
    qk_scale, out_scale = scale, 1.0
    if k_scale is not None:
        qk_scale *= tl.load(k_scale + kv_head)
    if v_scale is not None:
        out_scale *= tl.load(v_scale + kv_head)
    if SOFTCAP == 0.0:
        qk_scale *= LOG2E
    if tl.load(plan + 23) > 0:
        clear_uncovered_rows(out, lse, plan, queue, num_queues, kv_head, out_row, Q_HEADS, GROUP, V_DIM)
    num_workers = tl.load(plan + 9)
    items, indptr = plan + tl.load(plan + 18), plan + tl.load(plan + 22)
    # A list of its own for each queue, or one list that all of them share in strides.
    shared = num_workers == 1
    step = tl.where(shared, num_queues, 1)
    for worker in range(tl.where(shared, 0, queue), num_workers, num_queues):
        begin = tl.load(indptr + worker) + tl.where(shared, queue, 0)
        for i in range(begin, tl.load(indptr + worker + 1), step):
            item = items + i * 8
            pairs = tl.load(item + 1) * GROUP
            if SMALL_M < LARGE_M and pairs <= SMALL_M:
                run_tile(q, k_base, v_base, k_rows, v_rows, k_column, v_column, plan, sinks, out, lse,
                         partial_o, partial_ml, arrived, item, 0, kv_head, qk_scale, out_scale, window,
                         q_row, q_head, k_page, k_slot, v_page, v_slot, out_row,
                         Q_HEADS, GROUP, HEAD_DIM, V_DIM, PAGE_SIZE, WINDOWED, SOFTCAP, SMALL_M, BLOCK_N, STAGES)  # fmt: skip
            else:
                for m0 in range(0, pairs, LARGE_M):
                    run_tile(q, k_base, v_base, k_rows, v_rows, k_column, v_column, plan, sinks, out, lse,
                             partial_o, partial_ml, arrived, item, m0, kv_head, qk_scale, out_scale, window,
                             q_row, q_head, k_page, k_slot, v_page, v_slot, out_row,
                             Q_HEADS, GROUP, HEAD_DIM, V_DIM, PAGE_SIZE, WINDOWED, SOFTCAP, LARGE_M, BLOCK_N, STAGES)  # fmt: skip


def has_rows(pool: Tensor) -> bool:
    """Whether a pool is a matrix of token rows that the device's tensor memory accelerator can read."""
    pages, page_size, heads, dim = pool.shape
    size = pool.element_size()
    return (
        dim in (64, 128, 256)  # a box is a whole padded head: its columns must be this head's alone
        and pool.stride() == (page_size * pool.stride(1), pool.stride(1), dim, 1)
        and pool.stride(1) * size % 16 == 0
        and pool.data_ptr() % 16 == 0
    )


def pool_rows(pool: Tensor, block_n: int) -> TensorDescriptor:
    pages, page_size, heads, dim = pool.shape
    shape, strides = [pages * page_size, heads * dim], [pool.stride(1), 1]
    return TensorDescriptor(pool, shape, strides, [block_n, dim])


def tree_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: Tensor,
    header: list[int],
    scale: float,
    softcap: float,
    window: int,
    sinks: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    out: Tensor,
    tiles: Tiles | None = None,
    tma: bool | None = None,
) -> Tensor:
    """Fills `out`, returns lse. Of `header` (the plan's, on the host) only what is kept when a plan is advanced or
    written again in place is used: a captured launch stays valid. `tma`: pages of a partial that follow each other are
    read as boxes of rows, others still by index. None: if all of this plan's do and device, pool and table allow it."""
    rows, q_heads, head_dim = q.shape
    kv_heads, v_dim = k_pages.shape[2], v_pages.shape[3]
    lse = q.new_empty(rows, q_heads, dtype=torch.float32)
    if rows == 0:
        return lse
    boxes = BOX_TABLE.get((architecture(q.device), head_dim, k_pages.element_size())) if head_dim == v_dim else None
    if tma is None:
        tma = tiles is None and boxes is not None and header[24] == 0 and has_rows(k_pages) and has_rows(v_pages)
    tiles = tiles or (boxes if tma and boxes else choose_tiles(q, k_pages, v_pages))
    workers, cap_rows, cap_slots = header[9], header[10], header[13]
    queues = workers if workers > 1 else default_queues(q.device, kv_heads)
    size = cap_slots * q_heads
    scratch = workspace(q.device, size * (v_dim + 2), cap_rows * q_heads)
    rows_of = [pool_rows(pool, tiles.block_n) if tma else None for pool in (k_pages, v_pages)]
    tree_attention_kernel[(queues * kv_heads,)](
        q, k_pages, v_pages, *rows_of, plan, sinks, k_scale, v_scale,
        out, lse,
        scratch.records, scratch.records[size * v_dim :], scratch.arrived,
        scale, window, queues,
        q.stride(0), q.stride(1), *k_pages.stride()[:3], *v_pages.stride()[:3], out.stride(0),
        q_heads, kv_heads, head_dim, v_dim, k_pages.shape[1], window > 0, float(softcap),
        tiles.small_m, tiles.large_m, tiles.block_n, tiles.stages,
        num_warps=tiles.warps,
    )  # fmt: skip
    return lse
