"""Tree attention on a GPU: persistent launches over a plan's items, and one that merges the records of a row.

A program takes one (item, kv head) after the other. Its tile is up to BLOCK_M (row, query head of the group) pairs: K and V
stream past it in tiles of BLOCK_N tokens, as boxes of rows (TMA) if the pages of every partial follow each other, else
gathered by index. Large items (nodes that many rows share: bound by arithmetic) and small ones (leaves: bound by bytes)
want other tiles, warps and registers, so each kind has a launch, and both run at the same time. Items and segments are those
of csrc/include/ttskernels/plan.h.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from ttskernels._triton.on_device import on_device
from ttskernels._triton.tiles import BOX_TABLE, Tiles, architecture, begins_early, lookup, options, programs
from ttskernels._triton.tree_attention_merge import LOG2E, NEG_INF, finish, merge_kernel
from ttskernels._triton.workspace import workspace
from ttskernels.attention_launches import attention_launches

MERGE_WARPS = 1  # measured: 5 us less than 4 for 64 rows of 32 heads


@triton.jit
def add_tile(
    q, k, v, m, l, o, seen, qk_scale, MASKED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Adds one tile of tokens, k `[BLOCK_D, n]` and v `[n, BLOCK_V]`, to (m, l, o); `seen` says which if MASKED.

    m is in log2 units. l holds a row's sum, or, as `[rows, n]`, one sum for each column: that spares a narrow tile a
    reduction across warps for every tile of tokens.
    """
    s = tl.dot(q, k, input_precision="ieee")
    if SOFTCAP > 0.0:
        e = tl.exp2(tl.abs(s * qk_scale) * (-2.0 * LOG2E / SOFTCAP))
        s = tl.where(s < 0, -SOFTCAP, SOFTCAP) * (1.0 - e) / (1.0 + e)
        qk_scale = LOG2E
    if MASKED:
        s = tl.where(seen, s, NEG_INF)
    top = tl.maximum(m, tl.max(s, 1) * qk_scale)  # qk_scale > 0
    shift = top
    if MASKED:
        shift = tl.where(top == NEG_INF, 0.0, top)
    p = tl.exp2(s * qk_scale - shift[:, None])
    alpha = tl.exp2(m - shift)
    o = tl.dot(p.to(q.dtype), v, o * alpha[:, None], input_precision="ieee")
    if len(l.shape) == 2:
        l = l * alpha[:, None] + p
    else:
        l = l * alpha + tl.sum(p, 1)
    return top, l, o


@triton.jit
def attend_boxes(
    q, m, l, o, k_rows, v_rows, row0, k_column, v_column, lo, whole, hi, first, last, qk_scale,
    WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds tokens [lo, hi) of a partial whose token t is row row0 + t of the pool, by tensor descriptors. Every row sees
    all of [lo, whole), and of the rest tokens first .. last. What V holds outside of [lo, hi) may be anything."""
    n, upper = tl.arange(0, BLOCK_N), tl.minimum(last, hi - 1)
    start = lo // BLOCK_N * BLOCK_N
    LARGE: tl.constexpr = q.shape[0] >= 64  # bound by arithmetic: whole tiles without a mask
    if LARGE:
        for t in tl.range(start, whole, BLOCK_N, num_stages=STAGES):
            k = k_rows.load([row0 + t, k_column]).to(q.dtype).T
            v = v_rows.load([row0 + t, v_column]).to(q.dtype)
            m, l, o = add_tile(q, k, v, m, l, o, None, qk_scale, False, SOFTCAP)
        start = tl.maximum(start, whole)
    if (hi >= BLOCK_N) | LARGE:  # the last box reaches back into the one before: it holds nothing but tokens of this partial
        for t in tl.range(start, hi, BLOCK_N, num_stages=STAGES):
            at = tl.minimum(t, hi - BLOCK_N)
            if LARGE:
                at = tl.maximum(at, 0)
            token = at + n
            v = v_rows.load([row0 + at, v_column]).to(q.dtype)
            if LARGE:
                v = tl.where((token < hi)[:, None], v, 0.0)
            if WINDOWED:
                v = tl.where((token >= lo)[:, None], v, 0.0)
            k = k_rows.load([row0 + at, k_column]).to(q.dtype).T
            seen = (token[None, :] >= t) & (token[None, :] <= upper[:, None])
            if WINDOWED:
                seen = seen & (token[None, :] >= first[:, None])
            m, l, o = add_tile(q, k, v, m, l, o, seen, qk_scale, True, SOFTCAP)
    elif hi > lo:
        k = k_rows.load([row0, k_column]).to(q.dtype).T
        v = v_rows.load([row0, v_column]).to(q.dtype)
        v = tl.where((n < hi)[:, None], v, 0.0)
        if WINDOWED:
            v = tl.where((n >= lo)[:, None], v, 0.0)
        seen = n[None, :] <= upper[:, None]
        if WINDOWED:
            seen = seen & (n[None, :] >= first[:, None])
        m, l, o = add_tile(q, k, v, m, l, o, seen, qk_scale, True, SOFTCAP)
    return m, l, o


@triton.jit
def attend_pages(
    q, m, l, o, k_base, v_base, segs, seg, offset, lo, hi, first, last, qk_scale,
    k_page, k_slot, v_page, v_slot,
    WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds tokens [lo, hi) of one partial, gathered page by page; rows see its tokens first .. last."""
    BLOCK_D: tl.constexpr = q.shape[1]
    BLOCK_V: tl.constexpr = triton.next_power_of_2(V_DIM)
    n, d, dv = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    upper = tl.minimum(last, hi - 1)
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
        v_at = v_base + page * v_page + slot * v_slot
        v = tl.load(v_at[:, None] + dv[None, :], mask=live[:, None] & (dv[None, :] < V_DIM), other=0.0)
        seen = token[None, :] <= upper[:, None]
        if WINDOWED:
            seen = seen & (token[None, :] >= first[:, None])
        m, l, o = add_tile(q, k.to(q.dtype), v.to(q.dtype), m, l, o, seen, qk_scale, True, SOFTCAP)
    return m, l, o


@triton.jit
def pair_rows(item, first_pos, m0, kv_head, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """For pairs m0 .. of an item: which of its rows, of all rows of the plan, the query head, and whether there is such a
    pair. Called again where it is needed again, so that no register keeps it while tiles are added: loading the item's
    first position once more gives a 0 that the compiler cannot know."""
    pair = m0 + tl.load(item + 4) - first_pos + tl.arange(0, BLOCK_M)
    return pair // GROUP, tl.load(item) + pair // GROUP, kv_head * GROUP + pair % GROUP, pair < tl.load(item + 1) * GROUP


@triton.jit
def run_tile(
    q, k_base, v_base, k_rows, v_rows, k_column, v_column, plan, sinks, out, lse, partial_o, partial_ml,
    item, m0, kv_head, qk_scale, v_scale, window, q_row, q_head, k_page, k_slot, v_page, v_slot, out_row,
    Q_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(row, query head) pairs m0 .. m0 + BLOCK_M - 1 of one item, over all its partials."""
    BLOCK_D: tl.constexpr = triton.next_power_of_2(HEAD_DIM)
    BLOCK_V: tl.constexpr = triton.next_power_of_2(V_DIM)
    row_n = tl.load(item + 1)
    seg, seg_n = tl.load(item + 2), tl.load(item + 3)
    pos, slot, flags = tl.load(item + 4), tl.load(item + 5), tl.load(item + 6)
    first_pos, segs = pos, plan + tl.load(plan + 19)
    nth, plan_row, head, valid = pair_rows(item, first_pos, m0, kv_head, GROUP, BLOCK_M)
    row = tl.load(plan + tl.load(plan + 16) + plan_row, mask=valid, other=0)
    d = tl.arange(0, BLOCK_D)
    q_at = q + row.to(tl.int64) * q_row + head * q_head
    q_tile = tl.load(q_at[:, None] + d[None, :], mask=valid[:, None] & (d[None, :] < HEAD_DIM), other=0.0)
    last = tl.load(plan + tl.load(plan + 14) + row, mask=valid, other=-1)
    end = tl.max(last) + 1
    first, begin = 0, 0
    if WINDOWED:
        first = tl.where(last >= window, last - window + 1, 0)
        begin = tl.min(tl.where(valid, first, end))
        shared_end = 0  # tokens that every row sees: here none are known
    else:
        shared_end = tl.min(tl.where(valid, last, end - 1)) + 1

    fold = ((flags & 1) != 0) | (slot < 0)
    m = tl.full([BLOCK_M], NEG_INF, tl.float32)
    if BLOCK_M < 64:
        l = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    else:
        l = tl.zeros([BLOCK_M], tl.float32)
    o = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    dv = tl.arange(0, BLOCK_V)
    seg_end, pos_end = seg + seg_n, pos + tl.load(item + 7)
    while seg < seg_end:
        page0, offset = tl.load(segs + seg * 4), tl.load(segs + seg * 4 + 1)
        tokens = tl.minimum(tl.load(segs + seg * 4 + 3), pos_end - pos)
        lo, hi = tl.maximum(begin - pos, 0), tl.minimum(end - pos, tokens)
        hi = tl.where(lo < hi, hi, 0)  # nothing to see: no tile
        if k_rows is not None:
            whole = tl.maximum(tl.minimum(shared_end - pos, hi), 0) // BLOCK_N * BLOCK_N
            m, l, o = attend_boxes(q_tile, m, l, o, k_rows, v_rows, page0 * PAGE_SIZE + offset, k_column, v_column,
                                   lo, whole, hi, first - pos, last - pos, qk_scale,
                                   WINDOWED, SOFTCAP, BLOCK_N, STAGES)  # fmt: skip
        else:
            m, l, o = attend_pages(q_tile, m, l, o, k_base, v_base, segs, seg, offset, lo, hi, first - pos, last - pos,
                                   qk_scale, k_page, k_slot, v_page, v_slot,
                                   WINDOWED, SOFTCAP, PAGE_SIZE, HEAD_DIM, V_DIM, BLOCK_N, STAGES)  # fmt: skip
        seg += (offset + tokens + PAGE_SIZE - 1) // PAGE_SIZE
        pos += tokens
        if (slot >= 0) & ((seg >= seg_end) | (not fold)):
            if BLOCK_M < 64:
                total = tl.sum(l, 1)
            else:
                total = l
            nth, plan_row, head, valid = pair_rows(item, first_pos, m0, kv_head, GROUP, BLOCK_M)
            record = (slot + nth) * Q_HEADS + head
            tl.store(partial_ml + record * 2, m, mask=valid)
            tl.store(partial_ml + record * 2 + 1, total, mask=valid)
            tl.store(partial_o + record.to(tl.int64)[:, None] * V_DIM + dv[None, :], o,
                     mask=valid[:, None] & (dv[None, :] < V_DIM))  # fmt: skip
            slot += row_n
            m = tl.full([BLOCK_M], NEG_INF, tl.float32)  # so that the next tile takes nothing of l and o

    if slot < 0:
        if BLOCK_M < 64:
            total = tl.sum(l, 1)
        else:
            total = l
        nth, plan_row, head, valid = pair_rows(item, first_pos, m0, kv_head, GROUP, BLOCK_M)
        row = tl.load(plan + tl.load(plan + 16) + plan_row, mask=valid, other=0)
        finish(out, lse, sinks, row, head, valid, m, total, o, v_scale, out_row, Q_HEADS, V_DIM)


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
    partial_o, partial_ml, queue,                        # workspace; queue [2] is 0 before and after
    scale, window,
    q_row, q_head, k_page, k_slot, k_head, v_page, v_slot, v_head, out_row,  # strides in elements
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    LARGE: tl.constexpr, BESIDE: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """The large items of a plan, or the others. BESIDE: both are launched, and run at the same time. MERGED: `merge_kernel`
    is launched behind, and may begin to wait."""
    GROUP: tl.constexpr = Q_HEADS // KV_HEADS
    if BESIDE and LARGE:
        gdc_launch_dependents()
    program, programs = tl.program_id(0), tl.num_programs(0)
    first, last = 0, tl.load(plan + 25)
    if not LARGE:
        first, last = last, tl.load(plan + 5)
        if tl.load(plan + 23) > 0:
            clear_uncovered_rows(out, lse, plan, program // KV_HEADS, programs // KV_HEADS, program % KV_HEADS, out_row,
                                 Q_HEADS, GROUP, V_DIM)  # fmt: skip
    tasks, items = (last - first) * KV_HEADS, plan + tl.load(plan + 18) + first * 8
    task = program  # and the next one that nobody has taken, most expensive first
    while task < tasks:
        kv_head, item = task % KV_HEADS, items + task // KV_HEADS * 8
        k_base = k_pages + kv_head.to(tl.int64) * k_head
        v_base = v_pages + kv_head.to(tl.int64) * v_head
        qk_scale, out_scale = scale * LOG2E, 1.0
        if SOFTCAP > 0.0:
            qk_scale = scale
        if k_scale is not None:
            qk_scale *= tl.load(k_scale + kv_head)
        if v_scale is not None:
            out_scale *= tl.load(v_scale + kv_head)
        for m0 in range(0, tl.load(item + 1) * GROUP, BLOCK_M):
            run_tile(q, k_base, v_base, k_rows, v_rows, kv_head * HEAD_DIM, kv_head * V_DIM, plan, sinks, out, lse,
                     partial_o, partial_ml, item, m0, kv_head, qk_scale, out_scale, window,
                     q_row, q_head, k_page, k_slot, v_page, v_slot, out_row,
                     Q_HEADS, GROUP, HEAD_DIM, V_DIM, PAGE_SIZE, WINDOWED, SOFTCAP, BLOCK_M, BLOCK_N,
                     STAGES)  # fmt: skip
        if tasks > programs:
            task = programs + tl.atomic_add(queue, 1, sem="relaxed")
        else:
            task = tasks
    if tasks > programs:
        if tl.atomic_add(queue + 1, 1, sem="relaxed") == programs - 1:  # everybody has seen the end
            tl.store(queue, 0)
            tl.store(queue + 1, 0)
    if MERGED and not (BESIDE and LARGE):
        gdc_launch_dependents()
    if BESIDE and not LARGE:
        gdc_wait()  # whoever waits for this launch then waits for the other one too


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


@on_device
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
    written again in place is used: a captured launch stays valid. `tma`: tokens are read as boxes of rows, for plans
    whose partials all lie on pages that follow each other. None: if this one's do and device, pool and table allow it."""
    rows, q_heads, head_dim = q.shape
    kv_heads, v_dim = k_pages.shape[2], v_pages.shape[3]
    lse = q.new_empty(rows, q_heads, dtype=torch.float32)
    if rows == 0:
        return lse
    arch = architecture(q.device)
    boxes = BOX_TABLE.get((arch, head_dim, k_pages.element_size())) if head_dim == v_dim else None
    large, small, merge, straight = attention_launches(header)
    if tma is None:
        tma = tiles is None and boxes is not None and straight and has_rows(k_pages) and has_rows(v_pages)
    tiles = tiles or (boxes if tma and boxes else lookup(arch, head_dim, v_dim, k_pages.element_size()))
    size = header[13] * q_heads
    scratch = workspace(q.device, size * (v_dim + 2))
    records = scratch.records, scratch.records[size * v_dim :]
    if scale <= 0.0:  # the kernel takes the scale out of a maximum
        q, scale = (-q, -scale) if scale < 0.0 else (torch.zeros_like(q), 1.0)
    early = begins_early(q)
    beside, merged = early and large and small, early and merge
    for is_large in [True] * large + [False] * small:
        tile = tiles.large if is_large else tiles.small
        descriptors = [pool_rows(pool, tile.tokens) if tma else None for pool in (k_pages, v_pages)]
        tree_attention_kernel[(programs(q.device, tile, kv_heads),)](
            q, k_pages, v_pages, *descriptors, plan, sinks, k_scale, v_scale,
            out, lse,
            *records, scratch.counters[4 * is_large :],
            scale, window,
            q.stride(0), q.stride(1), *k_pages.stride()[:3], *v_pages.stride()[:3], out.stride(0),
            q_heads, kv_heads, head_dim, v_dim, k_pages.shape[1], window > 0, float(softcap),
            tile.rows, tile.tokens, tile.stages, is_large, beside, merged,
            num_warps=tile.warps, **options(tile, beside and not is_large),
        )  # fmt: skip
    if merge:
        merge_kernel[(rows, q_heads)](
            *records, plan, sinks, v_scale, out, lse, out.stride(0), q_heads, q_heads // kv_heads, v_dim, merged,
            num_warps=MERGE_WARPS, **options(None, merged),
        )  # fmt: skip
    return lse
