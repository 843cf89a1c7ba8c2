"""Random forests of KV nodes and several plans of the same rows, made straight from plan.h."""

import itertools
import random
from dataclasses import dataclass, field

import numpy as np
import torch

HEADER, PARTIAL = 32, 512
FOLD, FOLLOWS = 1, 2


@dataclass
class Node:
    parent: int  # -1: a root
    length: int
    offset: int  # tokens before it in its first page
    pages: list[int] = field(default_factory=list)
    pos0: int = 0
    slack: int = 0  # reserved slots after its last token


@dataclass
class Trees:
    nodes: list[Node]
    rows: list[tuple[int, int]]  # (node, index in node), caller order
    page_size: int
    num_pages: int

    def path(self, node: int) -> list[int]:
        return [] if node < 0 else [*self.path(self.nodes[node].parent), node]

    def position(self, row: int) -> int:
        node, index = self.rows[row]
        return self.nodes[node].pos0 + index

    def slots(self, node: int, slack: bool = False) -> list[tuple[int, int]]:
        n, size = self.nodes[node], self.page_size
        count = n.length + (n.slack if slack else 0)
        return [(n.pages[(n.offset + i) // size], (n.offset + i) % size) for i in range(count)]

    def used_slots(self) -> set[tuple[int, int]]:
        return {slot for node in range(len(self.nodes)) for slot in self.slots(node)}


def make_trees(nodes, rows, page_size=16, seed=0, slack=True, shuffled=True) -> Trees:
    """`nodes`: (parent, length, offset) each, parents first. Every node has pages of its own, shuffled or in order."""
    rng = random.Random(seed)
    made = [Node(*n) for n in nodes]
    inner = {n.parent for n in made}
    needed = [-(-(n.offset + n.length) // page_size) for n in made]
    order = list(range(sum(needed) + 3))
    if shuffled:
        rng.shuffle(order)
    for i, (n, pages) in enumerate(zip(made, needed, strict=True)):
        n.pages, order = order[:pages], order[pages:]
        n.pos0 = 0 if n.parent < 0 else made[n.parent].pos0 + made[n.parent].length
        n.slack = pages * page_size - n.offset - n.length if slack and i not in inner else 0
    return Trees(made, list(rows), page_size, sum(needed) + 3)


def random_trees(seed: int, page_size: int = 16, max_length: int = 90) -> Trees:
    """A forest of one to three trees; rows at leaf ends and at some tokens inside nodes, shuffled."""
    rng = random.Random(seed)
    nodes = []
    for i in range(rng.randint(2, 7)):
        parent = -1 if i == 0 or rng.random() < 0.15 else rng.randrange(i)
        nodes.append(
            (parent, rng.choice([1, 15, 16, 17, 64, rng.randint(1, max_length)]), rng.randrange(page_size))
        )
    leaves = set(range(len(nodes))) - {n[0] for n in nodes}
    rows = [(leaf, nodes[leaf][1] - 1) for leaf in leaves]
    rows += [(n, rng.randrange(nodes[n][1])) for n in range(len(nodes)) if rng.random() < 0.4]
    rng.shuffle(rows)
    return make_trees(nodes, rows, page_size, seed)


def segments(trees: Trees, node: int) -> list[list[tuple[int, int, int, int]]]:
    """Segments of each partial of a node."""
    partials: list[list[tuple[int, int, int, int]]] = []
    for i, (page, slot) in enumerate(trees.slots(node, slack=True)):
        if i % PARTIAL == 0:
            partials.append([])
        last = partials[-1]
        if last and last[-1][0] == page:
            last[-1] = (page, last[-1][1], last[-1][2] + 1, last[-1][3])
        else:
            last.append((page, slot, 1, 0))
    for part in partials:
        left = 0
        for i in reversed(range(len(part))):
            left += part[i][2]
            part[i] = (*part[i][:3], left)
    return partials


MODES = ("separate", "rows", "chunks", "pushed", "grouped", "prefix", "direct")
CPU_MODES = (*MODES, "walks", "walked prefix")


def build_plan(trees: Trees, mode: str = "separate", seed: int = 0) -> torch.Tensor:
    """One of several plans with the same meaning.

    separate: an item per node; rows / chunks: those split by rows / by partials; pushed: a fold item per row
    over its whole path; grouped: the same for all rows of a node; prefix: a fold item over the path to an
    inner node for everything below it, the rest separate; direct: as separate, but a root writes its
    single-partial rows itself; walks: blocks of rows from root to leaf, an item a node; walked prefix: those over the
    nodes near a root, which write records, the rest separate.
    """
    rng = random.Random(seed)
    order = sorted(range(len(trees.rows)), key=lambda r: (dfs_key(trees, trees.rows[r][0]), trees.rows[r]))
    below = {  # node -> plan rows of its subtree, an interval
        n: [i for i, r in enumerate(order) if n in trees.path(trees.rows[r][0])]
        for n in range(len(trees.nodes))
    }
    items, segs, slots = [], [], 0
    merges: list[list[int]] = [[] for _ in order]

    def emit(rows, partials, pos0, flags, direct=False):
        nonlocal slots
        if not rows or not partials:
            return
        flat = [s for part in partials for s in part]
        items.append((rows[0], len(rows), len(segs), len(flat), pos0, -1 if direct else slots, flags,
                      sum(s[2] for s in flat)))  # fmt: skip
        segs.extend(flat)
        if direct:
            return
        for g in range(1 if flags & FOLD else len(partials)):
            for i, row in enumerate(rows):
                merges[row].append(slots + g * len(rows) + i)
        slots += len(rows) * (1 if flags & FOLD else len(partials))

    if mode in ("walks", "walked prefix"):
        deepest = 99 if mode == "walks" else rng.randint(1, 2)
        near = [n for n in range(len(trees.nodes)) if len(trees.path(n)) <= deepest]
        for top in [n for n in near if trees.nodes[n].parent < 0 and below[n]]:
            rows, size = below[top], rng.randint(1, len(below[top]))
            for block in [rows[i : i + size] for i in range(0, len(rows), size)]:
                for n in [n for n in near if trees.path(n)[0] == top]:
                    emit([r for r in block if r in below[n]], segments(trees, n), trees.nodes[n].pos0,
                         FOLD if n == top else FOLD | FOLLOWS, direct=n != top or mode == "walks")  # fmt: skip
        for n in set(range(len(trees.nodes))) - set(near):
            emit(below[n], segments(trees, n), trees.nodes[n].pos0, 0)
    elif mode in ("pushed", "grouped"):
        by_node: dict[int, list[int]] = {}
        for i, r in enumerate(order):
            by_node.setdefault(trees.rows[r][0], []).append(i)
        for node, rows in by_node.items():
            path = trees.path(node)
            partials = [p for n in path for p in segments(trees, n)]
            for part in [[r] for r in rows] if mode == "pushed" else [rows]:
                emit(part, partials, trees.nodes[path[0]].pos0, FOLD, direct=True)
    else:
        folded: set[int] = set()
        if mode == "prefix":
            top = rng.randrange(len(trees.nodes))
            folded = set(trees.path(top))
            partials = [p for n in trees.path(top) for p in segments(trees, n)]
            emit(below[top], partials, 0, FOLD)
        for n in range(len(trees.nodes)):
            rows, partials, pos0 = below[n], segments(trees, n), trees.nodes[n].pos0
            if n in folded:
                rows = [r for r in rows if r not in below[top]]
            runs = [[r] for r in rows] if mode == "rows" else intervals(rows)
            if mode == "rows" and len(rows) > 3:
                runs = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
            for run in runs:
                if mode == "chunks":
                    for i, partial in enumerate(partials):
                        emit(run, [partial], pos0 + i * PARTIAL, 0)
                else:
                    alone = (
                        all(trees.path(trees.rows[order[r]][0]) == [n] for r in run) and len(partials) == 1
                    )
                    emit(run, partials, pos0, 0, direct=mode == "direct" and alone)
    if mode not in ("prefix", "walks", "walked prefix"):
        paired = sorted(zip(items, range(len(items)), strict=True), key=lambda _: rng.random())
        items = [i for i, _ in paired]  # the order of items means nothing
    return pack(trees, order, items, segs, slots, merges)


def planned(trees: Trees, heads, machine):
    """The planner's own plan of these rows."""
    from ttskernels.kv import plan_from_parents

    nodes = trees.nodes
    return plan_from_parents(
        [n.parent for n in nodes], [n.length for n in nodes], [0, *np.cumsum([len(n.pages) for n in nodes])],
        [p for n in nodes for p in n.pages], [node for node, _ in trees.rows],
        [trees.position(r) for r in range(len(trees.rows))], heads, first_offset=[n.offset for n in nodes],
        page_size=trees.page_size, machine=machine,
    )  # fmt: skip


def intervals(rows: list[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for r in rows:
        if runs and runs[-1][-1] == r - 1:
            runs[-1].append(r)
        else:
            runs.append([r])
    return runs


def dfs_key(trees: Trees, node: int) -> tuple[int, ...]:
    return tuple(trees.path(node))


def pack(trees, order, items, segs, slots, merges) -> torch.Tensor:
    n = len(order)
    sections = {
        14: [trees.position(r) for r in range(n)],
        15: [-1] * n,
        16: order,
        17: [0] * (4 * n),
        18: [x for i in items for x in i],
        19: [x for s in segs for x in s],
        20: np.cumsum([0, *map(len, merges)]).tolist(),
        21: [s for m in merges for s in m],
        22: [0, len(items)],
    }
    header = [0] * HEADER
    header[:14] = [0x4B535454, 1, 0, trees.page_size, n, len(items), len(segs), slots,
                   sum(map(len, merges)), 1, n, len(items), len(segs), sum(map(len, merges))]  # fmt: skip
    covered = {r for row_lo, row_n, *_ in items for r in range(row_lo, row_lo + row_n)}
    header[23] = n - len(covered)
    header[26] = sum(bool(i[6] & FOLLOWS) for i in items)
    header[24] = sum(a[2] < a[3] and b[0] != a[0] + 1 for a, b in itertools.pairwise(segs))
    body: list[int] = []
    for key, values in sections.items():
        header[key] = HEADER + len(body)
        body += values
    header[2] = HEADER + len(body)
    return torch.tensor(header + body, dtype=torch.int32)
