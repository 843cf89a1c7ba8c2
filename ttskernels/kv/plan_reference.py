"""The planner in Python and NumPy: the definition of csrc/cpu/plan_build.cpp and plan_assign.cpp, and their stand-in.

Both make the same choices from the same float64 arithmetic in the same order, so their buffers are equal.

1. Rows in DFS order, so that the rows at or below a node are one interval. Own rows come first, by position.
2. Bottom up, each node is either read once for all rows below it (separate) or pushed down to be read by the
   item of each child. Own rows count as one more child with no tokens. A path pushed down to the root is
   flat decoding; a tree whose chosen cost is above its flat cost is planned flat.
3. Every separate node, and every node with own rows that is pushed, ends a chain of itself and the pushed
   nodes above.
   A chain is an item per block of rows, cut at partial starts while there are too few tasks.
4. For a CPU, walks (plan_walks.py) in their place if they cost less.
"""

from __future__ import annotations

import functools
import math
from array import array
from typing import NamedTuple

import numpy as np

from ttskernels.kv.plan_assign import Item, assign_queues, assign_slots, cut_into_runs, row_targets, starts, trimmed
from ttskernels.kv.plan_layout import FOLD, FOLLOWS, PARTIAL_TOKENS, TILE_TOKENS, Costs, PlanStats, TreeSpec
from ttskernels.kv.plan_walks import make_walks

EVEN_PIECE = 10.0  # min_piece_us of a piece of work that is shared out evenly as it is


class Built(NamedTuple):
    """Everything a plan buffer holds, in plan order."""

    row_slot: list[int]
    row_perm: list[int]
    row_leaf: list[int]
    items: list[tuple[int, ...]]
    segs: array
    merge_indptr: list[int]
    merge_slots: list[int]
    num_slots: int
    worker_indptr: list[int]
    large_items: int
    followers: int
    stats: PlanStats


class BlockRates(dict):
    """Microseconds per token of an item of so many rows."""

    def __init__(self, costs: Costs):
        self.costs = costs

    def __missing__(self, rows: int) -> float:
        costs = self.costs
        padded = -(-rows * costs.group // costs.tile_rows) * costs.tile_rows
        self[rows] = rate = max(costs.byte_us, costs.flop_us * padded)
        return rate


class RowRates(dict):
    """Microseconds per token of so many rows, in even blocks of at most block_rows."""

    def __init__(self, block_rates: BlockRates):
        self.block_rates = block_rates

    def __missing__(self, rows: int) -> float:
        blocks = -(-rows // self.block_rates.costs.block_rows)
        size = -(-rows // blocks)
        last = rows - (blocks - 1) * size
        self[rows] = rate = (blocks - 1) * self.block_rates[size] + self.block_rates[last]
        return rate


@functools.lru_cache(maxsize=64)
def rates(costs: Costs) -> tuple[BlockRates, RowRates]:
    block_rates = BlockRates(costs)
    return block_rates, RowRates(block_rates)


def partial_tokens(costs: Costs) -> int:
    return 1 << 30 if costs.fold else PARTIAL_TOKENS


class Tree:
    """Per-node facts: positions, rows, how much is read, and whether its one row may advance."""

    def __init__(self, spec: TreeSpec, costs: Costs):
        self.partial_tokens = partial_tokens(costs)
        self.parent = parent = spec.parent.tolist()
        self.length = length = spec.length.tolist()
        self.offset = spec.first_offset.tolist()
        self.page_indptr = spec.page_indptr.tolist()
        self.pages = spec.pages.tolist()
        self.page_size = spec.page_size
        row_pos, row_node = spec.row_pos.tolist(), spec.row_node.tolist()
        nodes = len(parent)
        self.pos0 = pos0 = [0] * nodes
        for v in range(nodes):
            if parent[v] >= 0:
                pos0[v] = pos0[parent[v]] + length[parent[v]]
        self.own = own = [0] * nodes  # rows of the node itself
        self.reach = reach = [0] * nodes  # tokens that its own rows see
        for r, v in enumerate(row_node):
            own[v] += 1
            reach[v] = max(reach[v], row_pos[r] - pos0[v] + 1)
        self.total = total = own[:]  # rows at or below
        self.leaf = leaf = [True] * nodes  # no rows below
        for v in range(nodes - 1, -1, -1):
            if parent[v] >= 0 and total[v]:
                total[parent[v]] += total[v]
                leaf[parent[v]] = False
        self.row_lo = row_lo = [0] * nodes
        cursor = [0] * (nodes + 1)  # where the next child's rows start; the last entry is for roots
        for v in range(nodes):
            row_lo[v] = cursor[parent[v]]
            cursor[parent[v]] += total[v]
            cursor[v] = row_lo[v] + own[v]
        self.seen = [reach[v] if leaf[v] else length[v] for v in range(nodes)]
        self.growing = [leaf[v] and own[v] == 1 and reach[v] == length[v] for v in range(nodes)]
        capacity = spec.capacity.tolist()
        self.extent = [max(capacity[v], reach[v]) if self.growing[v] else self.seen[v] for v in range(nodes)]
        self._whole_pages(spec)
        # Stable: rows of one node at one position stay in the caller's order.
        place = np.asarray(row_lo, np.int64)[spec.row_node]
        self.perm = np.lexsort((spec.row_pos, place)).tolist()
        self.pos = spec.row_pos[self.perm].tolist()  # by plan row

    def segments(self, v: int) -> array:
        """[page, offset, count, left] of each page piece of the node, cut where a partial begins."""
        partial = self.partial_tokens
        if self.offset[v] == 0 and partial % self.page_size == 0:  # every piece is a page: the common case
            return self.whole_pages[4 * self.page_lo[v] : 4 * self.page_lo[v + 1]]
        out = array("i")
        token, end = 0, self.extent[v]
        while token < end:
            page, offset = divmod(self.offset[v] + token, self.page_size)
            left = min(end - token, partial - token % partial)
            count = min(self.page_size - offset, left)
            out.extend((self.pages[self.page_indptr[v] + page], offset, count, left))
            token += count
        return out

    def _whole_pages(self, spec: TreeSpec) -> None:
        """Pieces of every node as if it began on a page, and where each node's are: all of them in a few calls."""
        extent = np.asarray(self.extent, np.int64)
        used = -(-extent // self.page_size)
        bounds = np.concatenate([[0], used.cumsum()])
        piece = np.arange(bounds[-1]) - bounds[:-1].repeat(used)
        out = np.zeros((bounds[-1], 4), np.int32)
        at = spec.page_indptr[:-1].repeat(used) + piece
        out[:, 0] = spec.pages[np.minimum(at, len(spec.pages) - 1)]
        out[:, 2] = np.minimum(self.page_size, extent.repeat(used) - piece * self.page_size)
        first, partial = piece * self.page_size, self.partial_tokens
        out[:, 3] = np.minimum(extent.repeat(used) - first, partial - first % partial)
        self.whole_pages, self.page_lo = array("i", out.tobytes()), bounds.tolist()


def choose(tree: Tree, costs: Costs) -> tuple[list[bool], float, float]:
    """pushed[node], the modelled cost of the choice and that of flat decoding (us of one worker)."""
    nodes = len(tree.parent)
    row_rate = rates(costs)[1]
    pushed = [True] * nodes
    # Of the items that would take in a node above: cost, rate, blocks without tokens, partial records, open
    # rows (those that end at a separate node, so that even a fold from the root is a partial), and flat
    # decoding's rate.
    front_cost, rate, empty, records = [0.0] * nodes, [0.0] * nodes, [0] * nodes, [0] * nodes
    open_rows, flat_rate = [0] * nodes, [0.0] * nodes
    done, flat = [0.0] * nodes, [0.0] * nodes
    roots = []
    for v in range(nodes - 1, -1, -1):
        if tree.total[v] == 0:
            continue
        if tree.own[v]:
            own_rate, own_blocks = row_rate[tree.own[v]], -(-tree.own[v] // costs.block_rows)
            rate[v] += own_rate
            flat_rate[v] += own_rate
            flat[v] += own_blocks * costs.item_us
            empty[v] += own_blocks
        tokens, rows = tree.seen[v], tree.total[v]
        if tokens:
            groups = -(-tokens // partial_tokens(costs))
            flat[v] += tokens * flat_rate[v]
            push = tokens * rate[v] + empty[v] * costs.item_us
            once_rate, blocks = row_rate[rows], -(-rows // costs.block_rows)
            once = blocks * costs.item_us + tokens * once_rate
            extra = 0.0
            if tree.pos0[v] == 0:  # a separate root makes partials of everything below, and one of itself
                extra = (rows + records[v] - open_rows[v]) * costs.partial_us
            if once + extra < push:
                pushed[v] = False
                done[v] += front_cost[v] + records[v] * costs.partial_us
                front_cost[v], rate[v], empty[v], records[v], open_rows[v] = (
                    once,
                    once_rate,
                    0,
                    rows * groups,
                    rows,
                )
            else:
                front_cost[v] += push
                empty[v] = 0
                records[v] += rows * groups
        up = tree.parent[v]
        if up < 0:
            roots.append(v)
            continue
        front_cost[up] += front_cost[v]
        rate[up] += rate[v]
        empty[up] += empty[v]
        records[up] += records[v]
        open_rows[up] += open_rows[v]
        flat_rate[up] += flat_rate[v]
        done[up] += done[v]
        flat[up] += flat[v]
    modelled = flat_total = 0.0
    flat_trees = set()
    for v in roots:
        cost = done[v] + front_cost[v] + open_rows[v] * costs.partial_us
        if cost > flat[v]:
            flat_trees.add(v)
            cost = flat[v]
        modelled += cost
        flat_total += flat[v]
    if flat_trees:
        for v in range(nodes):
            if v in flat_trees or tree.parent[v] in flat_trees:
                flat_trees.add(v)
                pushed[v] = True
    return pushed, modelled, flat_total


def block_items(
    tree: Tree, pushed: list[bool], costs: Costs
) -> tuple[list[Item], array, dict[int, tuple[int, int]]]:
    """One item per chain and block of rows; the segments; and the segment range of each growing node."""
    block_rate = rates(costs)[0]
    items: list[Item] = []
    segs = array("i")
    grows: dict[int, tuple[int, int]] = {}
    pieces: dict[int, array] = {}
    parent, own, total, node_pos0, pos = tree.parent, tree.own, tree.total, tree.pos0, tree.pos
    for v, is_pushed in enumerate(pushed):
        rows = own[v] if is_pushed else total[v]
        if rows == 0:
            continue
        chain, up = [v], parent[v]
        while up >= 0 and pushed[up]:
            chain.append(up)
            up = parent[up]
        pos0, seg_lo = node_pos0[chain[-1]], len(segs) // 4
        for u in reversed(chain):
            if u not in pieces:
                pieces[u] = tree.segments(u)
            segs += pieces[u]
        seg_hi = len(segs) // 4
        growing = tree.growing[v]
        if growing:
            grows[v] = (seg_hi - len(pieces[v]) // 4, seg_hi)
        stop = node_pos0[v] + tree.extent[v]
        size = -(-rows // -(-rows // costs.block_rows))
        row_lo = tree.row_lo[v]
        row_hi = row_lo + rows
        for lo in range(row_lo, row_hi, size):
            hi = min(lo + size, row_hi)
            last = pos[hi - 1]
            n, tokens = trimmed(segs, seg_lo, seg_hi - seg_lo, stop - pos0, last - pos0, growing)
            cost = costs.item_us + (min(pos0 + tokens, last + 1) - pos0) * block_rate[hi - lo]
            items.append(Item(lo, hi - lo, seg_lo, n, pos0, tokens, cost, growing))
    return items, segs, grows


def split_items(tree: Tree, items: list[Item], segs: array, costs: Costs) -> list[Item]:
    """Cut long items while there are too few (item, kv head) tasks for the workers: at partial starts or, where items
    fold, at any segment behind whole tiles of one. A lone item whose heads share out evenly gains nothing by it but that a
    worker may be late, so only long pieces are cut off it."""
    total = 0.0
    for item in items:
        total += item.cost
    target = total / costs.tasks * costs.kv_heads
    even = len(items) == 1 and not costs.fold and costs.kv_heads % costs.workers == 0
    least = costs.min_piece_us * (EVEN_PIECE if even else 1.0)
    block_rate = rates(costs)[0]
    out: list[Item] = []
    for item in items:
        wanted = math.floor(item.cost / target + 0.5) if costs.fold else math.ceil(item.cost / target)
        pieces = min(wanted, int(item.cost / least))
        if pieces <= 1 or item.tokens <= (TILE_TOKENS if costs.fold else PARTIAL_TOKENS):
            out.append(item)
            continue
        cuts, before = [item.seg_lo], [0]
        token = tiles_from = 0
        for s in range(item.seg_lo, item.seg_lo + item.seg_n):
            may = s > item.seg_lo and starts(segs, s)
            if may:
                tiles_from = token
            may = may or (costs.fold and (token - tiles_from) % TILE_TOKENS == 0)
            if s > item.seg_lo and may and token * pieces >= item.tokens * len(cuts):
                cuts.append(s)
                before.append(token)
                tiles_from = token
            token += segs[s * 4 + 2]
        cuts.append(item.seg_lo + item.seg_n)
        before.append(token)
        for lo, hi, start, end in zip(cuts, cuts[1:], before, before[1:], strict=False):
            row_lo, row_hi, pos0 = item.row_lo, item.row_lo + item.row_n, item.pos0 + start
            while not item.growing and tree.pos[row_lo] < pos0:
                row_lo += 1  # sees nothing of this piece
            seen = max(0, min(end - start, tree.pos[row_hi - 1] + 1 - pos0))
            cost = costs.item_us + seen * block_rate[row_hi - row_lo]
            out.append(Item(row_lo, row_hi - row_lo, lo, hi - lo, pos0, end - start, cost, item.growing))
    return out


def build(spec: TreeSpec, costs: Costs) -> Built:
    tree = Tree(spec, costs)
    pushed, modelled, flat = choose(tree, costs)
    rows, modelled_us = len(tree.pos), modelled / costs.workers
    walks = make_walks(tree, modelled_us, costs, rates(costs)[0])
    if walks:
        items, segs, grows, modelled_us = walks
        slots, merge_indptr, merge_slots, num_slots = [-1] * len(items), [0] * (rows + 1), [], 0
    else:
        items, segs, grows = block_items(tree, pushed, costs)
        items = split_items(tree, items, segs, costs)
        if costs.fold and segs:
            cut_into_runs(segs)
        slots, merge_indptr, merge_slots, num_slots = assign_slots(items, segs, rows, costs.fold)
    order, worker_indptr, large_items = assign_queues(items, costs)
    row_slot, row_leaf = row_targets(spec, tree, segs, grows)
    packed, walk, followers = [], -1, 0
    for i in order:
        item = items[i]
        flags = FOLD if costs.fold or walks or item.pos0 == 0 else 0
        if walks and item.walk == walk:
            flags |= FOLLOWS
            followers += 1
        walk = item.walk
        packed.append(
            (item.row_lo, item.row_n, item.seg_lo, item.seg_n, item.pos0, slots[i], flags, item.tokens)
        )
    stats = PlanStats(
        items=len(items),
        partial_slots=num_slots,
        unique_tokens=sum(s for s, t in zip(tree.seen, tree.total, strict=True) if t),
        flat_tokens=sum(p + 1 for p in tree.pos),
        modelled_us=modelled_us,
        flat_us=flat / costs.workers,
    )
    return Built(
        row_slot, tree.perm, row_leaf, packed, segs, merge_indptr, merge_slots, num_slots, worker_indptr,
        large_items, followers, stats
    )  # fmt: skip
