"""The planner's last steps in Python: where items write, who runs them, and where new tokens go (plan_assign.cpp)."""

from __future__ import annotations

import heapq
import itertools
from array import array
from typing import NamedTuple

import numpy as np

from ttskernels.kv.plan_layout import RUN_TOKENS, Costs, TreeSpec


class Item(NamedTuple):
    row_lo: int
    row_n: int
    seg_lo: int
    seg_n: int
    pos0: int
    tokens: int
    cost: float  # of its whole walk
    growing: bool
    walk: int = -1  # its number; -1: it is one by itself


def starts(segs: array, s: int) -> bool:
    """Whether a partial begins at segment s: where the one before has ended."""
    return s == 0 or segs[s * 4 - 1] == segs[s * 4 - 2]


def cut_into_runs(segs: array) -> None:
    """End partials at page breaks, where these are RUN_TOKENS apart or more on average: a GPU then reads boxes of rows."""
    page, _, count, left = np.frombuffer(segs, np.intc).reshape(-1, 4).T
    goes_on = left[:-1] > count[:-1]
    follows = page[1:] == page[:-1] + 1
    if np.count_nonzero(goes_on & ~follows) * RUN_TOKENS > count.sum():
        return
    ends = np.append(np.flatnonzero(~(goes_on & follows)), len(count) - 1)  # last segments of partials
    total = count.cumsum()
    left[:] = total[ends[np.searchsorted(ends, np.arange(len(count)))]] - total + count


def trimmed(segs: array, lo: int, n: int, tokens: int, last: int, growing: bool) -> tuple[int, int]:
    """Segments and tokens of an item whose last row sees its tokens up to `last`; a row that moves on keeps all."""
    while not growing and n > 1 and tokens - segs[(lo + n) * 4 - 2] > last:
        n -= 1
        tokens -= segs[(lo + n) * 4 + 2]
    return n, tokens


def assign_slots(
    items: list[Item], segs: array, rows: int, fold: bool
) -> tuple[list[int], list[int], list[int], int]:
    """Slot of each item (-1: direct), merge lists of the rows, number of slots. Items come root to leaf."""
    change = [0] * (rows + 1)
    for item in items:
        change[item.row_lo] += 1
        change[item.row_lo + item.row_n] -= 1
    parts = list(itertools.accumulate(change))  # items of each row
    merges: list[list[int]] = [[] for _ in range(rows)]
    slots, used = [], 0
    for item in items:
        if item.pos0 == 0 and max(parts[item.row_lo : item.row_lo + item.row_n]) == 1:
            slots.append(-1)
            continue
        groups = 1
        if not fold and item.pos0:
            groups += sum(starts(segs, s) for s in range(item.seg_lo + 1, item.seg_lo + item.seg_n))
        slots.append(used)
        rows_of_item = merges[item.row_lo : item.row_lo + item.row_n]
        for _ in range(groups):
            for slot, part in enumerate(rows_of_item, used):
                part.append(slot)
            used += item.row_n
    indptr = [0]
    for part in merges:
        indptr.append(indptr[-1] + len(part))
    return slots, indptr, [s for part in merges for s in part], used


def assign_queues(items: list[Item], costs: Costs) -> tuple[list[int], list[int], int]:
    """Items' order (dearest item or walk first, where items fold the large ones before the small; longest processing time
    first over queues), queues' bounds, and how many are large."""
    order = sorted(range(len(items)), key=lambda i: (-items[i].cost, items[i].walk))
    large = []
    if costs.fold:
        large = [i for i in order if items[i].row_n * costs.group > costs.tile_rows]
        order = large + [i for i in order if items[i].row_n * costs.group <= costs.tile_rows]
    lists: list[list[int]] = [[] for _ in range(costs.queues)]
    heap = [(0.0, q) for q in range(costs.queues)]
    for i in order:
        load, q = heap[0]
        lists[q].append(i)
        heapq.heapreplace(heap, (load + items[i].cost, q))
    indptr = [0]
    for part in lists:
        indptr.append(indptr[-1] + len(part))
    return [i for part in lists for i in part], indptr, len(large)


def row_targets(
    spec: TreeSpec, tree, segs: array, grows: dict[int, tuple[int, int]]
) -> tuple[list[int], list[int]]:
    """row_slot and row_leaf of every row, caller's order."""
    slots, leaves = [], []
    cached = spec.cached.tolist()
    for v, pos in zip(spec.row_node.tolist(), spec.row_pos.tolist(), strict=True):
        token = pos - tree.pos0[v]
        page, offset = divmod(tree.offset[v] + token, tree.page_size)
        slots.append(
            -1 if token < cached[v] else tree.pages[tree.page_indptr[v] + page] * tree.page_size + offset
        )
        if not tree.growing[v]:
            leaves += (-1, 0, -1, 0)
            continue
        seg, end = grows[v]
        while token >= segs[seg * 4 + 2]:
            token -= segs[seg * 4 + 2]
            seg += 1
        leaves += (seg, token, end, 0)
    return slots, leaves
