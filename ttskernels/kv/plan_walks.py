"""Plans of walks in Python: the definition of csrc/cpu/plan_walks.cpp.

A walk takes a block of rows from their root to their leaves: an item for every node on the way, each for the rows that pass
it, which go on where the item above left them. It writes results, no partial records, and nothing is merged. Records are
better where there are too few rows for the threads.
"""

from __future__ import annotations

import math
from array import array
from typing import NamedTuple

from ttskernels.kv.plan_assign import Item, trimmed
from ttskernels.kv.plan_layout import Costs


class Walks(NamedTuple):
    items: list[Item]
    segs: array
    grows: dict[int, tuple[int, int]]  # segment range of each growing node
    modelled: float


def make_walks(tree, modelled: float, costs: Costs, block_rate: dict[int, float]) -> Walks | None:
    """A walk per block of a tree's rows; None unless the model has it that they beat items with records (`modelled` us)."""
    rows = len(tree.pos)
    if not costs.walks or rows == 0:
        return None
    workers, heads = costs.workers, costs.kv_heads
    most = min(costs.block_rows, -(-rows // -(-workers // heads)))
    nodes = len(tree.parent)
    first, size, number = [0] * nodes, [1] * nodes, [0] * nodes  # of each node's tree: first row, rows a walk, first walk
    walks, total, divided = 0, 0.0, 0.0  # cost of the items, and of the same with their rows in two parts
    items: list[tuple[int, Item]] = []
    for v, up in enumerate(tree.parent):
        row_lo, count, pos0, seen = tree.row_lo[v], tree.total[v], tree.pos0[v], tree.seen[v]
        if pos0 == 0:  # nothing above has tokens
            blocks = max(1, -(-count // most))
            first[v], size[v], number[v] = row_lo, max(1, -(-count // blocks)), walks
            if seen:
                walks += -(-count // size[v])
        else:
            first[v], size[v], number[v] = first[up], size[up], number[up]
        if not seen:
            continue
        lo, end = row_lo, row_lo + count
        while lo < end:
            block = (lo - first[v]) // size[v]
            hi = min(end, first[v] + (block + 1) * size[v])
            sees = min(pos0 + tree.extent[v], tree.pos[hi - 1] + 1) - pos0
            cost = (costs.item_us if pos0 == 0 else 0.0) + sees * block_rate[hi - lo]
            items.append((v, Item(lo, hi - lo, -1, 0, pos0, tree.extent[v], cost, tree.growing[v], number[v] + block)))
            total += cost
            divided += cost + sees * (2.0 * block_rate[(hi - lo + 1) // 2] - block_rate[hi - lo])
            lo = hi
    # The kernel divides one walk of a head that two threads share, if it has the rows.
    common = math.gcd(workers, heads)
    shared = workers - common if walks == 1 and workers <= heads and rows > 1 else 0
    total += (divided - total) * shared / heads
    tasks = min(rows, max(walks, workers // common)) * heads
    total = total * (-(-tasks // workers) * workers) / tasks / workers
    if total >= modelled:
        return None

    segs = array("i")
    ranges: dict[int, tuple[int, int]] = {}
    cost_of = [0.0] * walks
    for i, (v, item) in enumerate(items):
        if v not in ranges:
            ranges[v] = (len(segs) // 4, (len(segs) + len(pieces := tree.segments(v))) // 4)
            segs += pieces
        lo, hi = ranges[v]
        n, tokens = trimmed(segs, lo, hi - lo, item.tokens, tree.pos[item.row_lo + item.row_n - 1] - item.pos0, item.growing)
        items[i] = (v, item._replace(seg_lo=lo, seg_n=n, tokens=tokens))
        cost_of[item.walk] += item.cost
    grows = {v: ranges[v] for v, _ in items if tree.growing[v]}
    return Walks([item._replace(cost=cost_of[item.walk]) for _, item in items], segs, grows, total)
