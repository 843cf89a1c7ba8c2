"""Plans: which query rows read which KV together. Built when the tree changes, advanced once per iteration.

The buffer is defined in csrc/include/ttskernels/plan.h (NumPy twin: plan_layout.py). The C++ planner serves
when the extension is built, the NumPy one (plan_reference.py) otherwise; their plans are equal.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence

import numpy as np
import torch

from ttskernels import _dispatch
from ttskernels.kv import plan_layout as at
from ttskernels.kv import plan_reference
from ttskernels.kv.cpu_machine import cpu_machine
from ttskernels.kv.forest import Forest, Node
from ttskernels.kv.plan_layout import (
    HeadShape,
    Machine,
    PlanStats,
    Sizes,
    capacities,
    cost_constants,
    section_offsets,
)
from ttskernels.kv.pool import PAGE_SIZE


class Plan:
    """A packed plan. `buffer` is the int32 tensor that `tree_attention` and the decoder take."""

    __slots__ = ("buffer", "_array", "_address", "_stats", "_impl", "_source")

    def __init__(self, cap: Sizes, queues: int, impl: str):
        offsets, total = section_offsets(cap, queues)
        self.buffer = torch.zeros(total, dtype=torch.int32)
        self._array = self.buffer.numpy()
        self._address = self._array.ctypes.data
        self._impl = impl
        self._array[: at.WORKER_INDPTR + 1] = (
            at.MAGIC, at.VERSION, total, 0, 0, 0, 0, 0, 0, queues, *cap, *offsets
        )  # fmt: skip

    @property
    def num_rows(self) -> int:
        return int(self._array[at.NUM_ROWS])

    @property
    def header(self) -> list[int]:
        """The header's integers, on the host."""
        return self._array[: at.HEADER_INTS].tolist()

    @property
    def row_pos(self) -> np.ndarray:
        """`[rows]` int32 view: absolute position of each row's token, caller's order."""
        return at.section(self._array, at.ROW_POS)

    @property
    def row_slot(self) -> np.ndarray:
        """`[rows]` int32 view: page * page_size + slot where the row's K, V go; -1: they are there."""
        return at.section(self._array, at.ROW_SLOT)

    @property
    def positions(self) -> torch.Tensor:
        """`row_pos` as a tensor."""
        return torch.from_numpy(self.row_pos)

    @property
    def slots(self) -> torch.Tensor:
        """`row_slot` as a tensor."""
        return torch.from_numpy(self.row_slot)

    def to(self, device: torch.device | str):
        """A `DevicePlan`: this plan, made with `gpu_machine`, on a GPU. ValueError for a CPU's."""
        from ttskernels.kv.device_plan import DevicePlan

        return DevicePlan(self, device)

    def section(self, field: int) -> np.ndarray:
        """View of the used part of a section (fields of plan_layout)."""
        return at.section(self._array, field)

    def advance(self) -> bool:
        """One token further: row_pos += 1, row_slot moves on, in place.

        Only rows at the end of a leaf of their own can move. False, and nothing changed, if some row cannot,
        because its reserved slots are used up: reserve and build a new plan.
        """
        if self._impl == "cpu":
            return _library().ttsk_plan_advance(self._address) == 0
        return advance_reference(self._array)

    def of_rows(self, rows: Sequence[int]) -> Plan:
        """A plan of some of these rows (numbers of this plan's rows, any order, repeats allowed) over the same tree.

        Each reads the same tokens, cut into the same partials, so its attention has the same bits.
        """
        packed, heads, machine = self._source
        spec = at.unpack_spec(packed.copy())
        if len(spec.row_pos):
            moved = self.row_pos[0] - spec.row_pos[0]  # by advance: each row the only one of a leaf, at its last id
            spec.row_pos[:] += moved
            spec.length[spec.row_node] += moved
        chosen = np.asarray(rows, np.int64)
        tree = spec.packed[: len(packed) - 2 * len(spec.row_pos)]
        tree[1] = len(chosen)
        picked = np.concatenate([tree, spec.row_node[chosen], spec.row_pos[chosen]])
        return _build(picked, heads, machine, None, self._impl)

    @property
    def folds(self) -> bool:  # `Machine.fold` of the machine it was made for
        return self._source[2].fold

    def stats(self) -> PlanStats:
        return self._stats

    def fits(self, need: Sizes, queues: int) -> bool:
        plan = self._array
        caps = plan[at.CAP_ROWS : at.CAP_MERGES + 1].tolist()
        return queues == int(plan[at.NUM_WORKERS]) and all(n <= c for n, c in zip(need, caps, strict=True))


def build_plan(
    forest: Forest,
    rows: Sequence[tuple[Node, int, int]],
    heads: HeadShape,
    *,
    machine: Machine | None = None,
    reuse: Plan | None = None,
    impl: str = "auto",
) -> Plan:
    """Plan the attention of query rows over the paths of their nodes.

    Args:
        rows: `(node, first, count)` in the caller's row order: the rows of node.ids[first : first + count].
            Slots for them must be reserved. Every token without KV on a path must have a row here.
        machine: cost constants; None: this CPU's, see `cpu_machine`. For a GPU: `machines.gpu_machine(heads)`.
        reuse: a plan whose buffer is written again if the new plan fits it (same address: graph-safe).
        impl: "cpu" (C++), "reference" (NumPy) or "auto".
    Raises:
        ValueError: a row outside its node or its reserved slots, or a token on a path without KV or row.
        ReleasedNodeError: a row's node was released.
    """
    index: dict[Node, int] = {}
    parent, length, capacity, cached, offset, indptr, pages = [], [], [], [], [], [0], []
    row_node, row_pos = [], []
    ready: list[int] = []  # tokens of each node that have KV, or a row so far
    for node, first, count in rows:
        at_node = index.get(node)
        if at_node is None:
            chain: list[Node] = []
            up: Node | None = node
            while up is not None and up not in index:
                chain.append(up)
                up = up.parent
            above = -1 if up is None else index[up]
            while chain:
                part = chain.pop()
                index[part] = at_node = len(parent)
                parent.append(above)
                above = at_node
                size, slots = len(part.ids), len(part.pages) * PAGE_SIZE - part.first_offset
                length.append(size)
                capacity.append(size if part.sealed else slots)
                cached.append(part.cached)
                ready.append(part.cached)
                offset.append(part.first_offset)
                pages += part.pages
                indptr.append(len(pages))
        if node.released:
            forest.path(node)  # raises
        if first < 0 or count < 1 or first + count > length[at_node]:
            raise ValueError(
                f"rows: {count} rows from {first} are not within the {length[at_node]} ids of {node}"
            )
        if first > ready[at_node]:
            raise ValueError(
                f"rows: ids {ready[at_node]}..{first - 1} of {node} have no KV and no row before this one"
            )
        if first + count > node.capacity:
            raise ValueError(
                f"rows: {node} has {node.capacity} slots for {first + count} ids; call reserve first"
            )
        if first + count > ready[at_node]:
            ready[at_node] = first + count
        start = node.pos0 + first
        if count == 1:
            row_node.append(at_node)
            row_pos.append(start)
        else:
            row_node += [at_node] * count
            row_pos += range(start, start + count)
    for v in set(parent):
        if v >= 0 and ready[v] < length[v]:
            node = next(n for n, i in index.items() if i == v)
            raise ValueError(
                f"rows: ids {ready[v]}..{length[v] - 1} of {node}, on a row's path, have neither KV nor a row"
            )
    sizes = [len(parent), len(row_node), len(pages), PAGE_SIZE]
    flat = sizes + parent + length + capacity + cached + offset + indptr + pages + row_node + row_pos
    return _build(np.frombuffer(array("i", flat), np.int32), heads, machine, reuse, impl)


def plan_from_parents(
    parent: Sequence[int],
    length: Sequence[int],
    page_indptr: Sequence[int],
    pages: Sequence[int],
    row_node: Sequence[int],
    row_pos: Sequence[int],
    heads: HeadShape,
    *,
    first_offset: Sequence[int] | None = None,
    cached: Sequence[int] | None = None,
    page_size: int = PAGE_SIZE,
    machine: Machine | None = None,
    reuse: Plan | None = None,
    impl: str = "auto",
) -> Plan:
    """Plan over a tree given as arrays.

    Args:
        parent: `[nodes]`, -1 for a root, a parent before its children; `length` tokens each, on
            `pages[page_indptr[v] : page_indptr[v + 1]]` from slot `first_offset[v]` (0) of the first page on.
            Slots past `length` of a node without children are its room to advance.
        row_node, row_pos: `[rows]` node and absolute position of each query row.
        cached: `[nodes]` tokens whose KV exists (all): later ones get a row_slot.
    """
    nodes = len(parent)
    arrays = {
        "parent": parent,
        "length": length,
        "first_offset": np.zeros(nodes, np.int32) if first_offset is None else first_offset,
        "cached": length if cached is None else cached,
        "page_indptr": page_indptr,
        "pages": pages,
        "row_node": row_node,
        "row_pos": row_pos,
    }
    a = {name: np.asarray(value, np.int32).reshape(-1) for name, value in arrays.items()}
    _check_tree(a, page_size)
    slots = np.diff(a["page_indptr"]) * page_size - a["first_offset"]
    inner = np.zeros(nodes, bool)
    inner[a["parent"][a["parent"] >= 0]] = True
    capacity = np.where(inner, a["length"], slots).astype(np.int32)
    sizes = np.array([nodes, len(a["row_node"]), len(a["pages"]), page_size], np.int32)
    names = ("length", "capacity", "cached", "first_offset", "page_indptr", "pages", "row_node", "row_pos")
    packed = np.concatenate([sizes, a["parent"], *(capacity if n == "capacity" else a[n] for n in names)])
    return _build(packed, heads, machine, reuse, impl)


def _check_tree(a: dict[str, np.ndarray], page_size: int) -> None:
    nodes, rows = len(a["parent"]), len(a["row_node"])
    sizes = {
        "length": nodes,
        "first_offset": nodes,
        "cached": nodes,
        "page_indptr": nodes + 1,
        "row_pos": rows,
    }
    for name, size in sizes.items():
        if len(a[name]) != size:
            raise ValueError(
                f"{name} must have {size} entries for {nodes} nodes and {rows} rows, got {len(a[name])}"
            )
    if page_size < 1:
        raise ValueError(f"page_size must be positive, got {page_size}")
    order = np.arange(nodes)
    bad = np.flatnonzero((a["parent"] < -1) | (a["parent"] >= order))
    if bad.size:
        raise ValueError(f"parent[{bad[0]}] must be -1 or a node before {bad[0]}, got {a['parent'][bad[0]]}")
    per_node = np.diff(a["page_indptr"])
    if a["page_indptr"][0] != 0 or (per_node < 0).any() or a["page_indptr"][-1] != len(a["pages"]):
        raise ValueError(f"page_indptr must rise from 0 to len(pages) = {len(a['pages'])}")
    offset, length = a["first_offset"], a["length"]
    bad = np.flatnonzero(
        (length < 0) | (offset < 0) | (offset >= page_size) | (offset + length > per_node * page_size)
    )
    if bad.size:
        v = bad[0]
        raise ValueError(
            f"node {v}: {length[v]} tokens from slot {offset[v]} on need pages of {page_size}, "
            f"got {per_node[v]} pages"
        )
    pos0 = np.zeros(nodes, np.int64)
    for v in range(nodes):
        if a["parent"][v] >= 0:
            pos0[v] = pos0[a["parent"][v]] + length[a["parent"][v]]
    bad = np.flatnonzero((a["row_node"] < 0) | (a["row_node"] >= nodes))
    if bad.size:
        raise ValueError(f"row_node[{bad[0]}] must be in 0..{nodes - 1}, got {a['row_node'][bad[0]]}")
    token = a["row_pos"] - pos0[a["row_node"]]
    bad = np.flatnonzero((token < 0) | (token >= length[a["row_node"]]))
    if bad.size:
        r, v = bad[0], a["row_node"][bad[0]]
        raise ValueError(
            f"row_pos[{r}] must be in its node's {pos0[v]}..{pos0[v] + length[v] - 1}, got {a['row_pos'][r]}"
        )


def _build(packed: np.ndarray, heads: HeadShape, machine: Machine | None, reuse: Plan | None, impl: str) -> Plan:
    machine = machine or cpu_machine()
    build = _build_cpu if _resolve(impl) == "cpu" else _build_reference
    plan = build(packed, cost_constants(heads, machine), reuse)
    plan._source = (packed, heads, machine)
    return plan


def _build_reference(packed: np.ndarray, costs: at.Costs, reuse: Plan | None) -> Plan:
    spec = at.unpack_spec(packed)
    built = plan_reference.build(spec, costs)
    need = Sizes(len(built.row_perm), len(built.items), len(built.segs) // 4, len(built.merge_slots))
    plan = _room(need, costs.queues, reuse, "reference")
    a = plan._array
    a[at.PAGE_SIZE_AT : at.NUM_MERGES + 1] = (spec.page_size, *need[:3], built.num_slots, need.merges)
    pages, count, left = (np.asarray(built.segs[i::4]) for i in (0, 2, 3))
    a[at.PAGE_BREAKS] = np.count_nonzero((left > count)[:-1] & (np.diff(pages) != 1))
    a[at.LARGE_ITEMS], a[at.FOLLOWERS] = built.large_items, built.followers
    for field, values in (
        (at.ROW_POS, spec.row_pos),
        (at.ROW_SLOT, built.row_slot),
        (at.ROW_PERM, built.row_perm),
        (at.ROW_LEAF, built.row_leaf),
        (at.ITEMS, [x for item in built.items for x in item]),
        (at.SEGS, built.segs),
        (at.MERGE_INDPTR, built.merge_indptr),
        (at.MERGE_SLOTS, built.merge_slots),
        (at.WORKER_INDPTR, built.worker_indptr),
    ):
        a[a[field] : a[field] + len(values)] = values
    plan._stats = built.stats
    return plan


def _room(need: Sizes, queues: int, reuse: Plan | None, impl: str) -> Plan:
    if reuse is not None and reuse.fits(need, queues):
        reuse._impl = impl
        return reuse
    return Plan(capacities(need), queues, impl)


def _resolve(impl: str) -> str:
    if impl not in ("auto", "cpu", "reference"):
        raise ValueError(f"impl of a planner must be auto, cpu or reference, got {impl!r}")
    if impl == "reference" or (impl == "auto" and _dispatch.load_extension() is not None):
        return "reference"
    _library()
    return "cpu"


def advance_reference(plan: np.ndarray) -> bool:
    """PlanAdvance in NumPy."""
    rows = int(plan[at.NUM_ROWS])
    leaf = at.section(plan, at.ROW_LEAF).reshape(rows, 4)
    segs = at.section(plan, at.SEGS)
    seg, used = leaf[:, 0], leaf[:, 1] + 1
    if rows == 0:
        return True
    if (seg < 0).any():
        return False
    onward = used >= segs["count"][seg]
    seg, used = seg + onward, np.where(onward, 0, used)
    if (seg >= leaf[:, 2]).any():
        return False
    leaf[:, 0], leaf[:, 1] = seg, used
    at.section(plan, at.ROW_POS)[:] += 1
    at.section(plan, at.ROW_SLOT)[:] = segs["page"][seg] * plan[at.PAGE_SIZE_AT] + segs["offset"][seg] + used
    return True


@functools.cache
def _library() -> ctypes.CDLL:
    lib = _dispatch.library()
    pointer = ctypes.c_void_p
    lib.ttsk_plan_compute.argtypes, lib.ttsk_plan_compute.restype = (pointer, pointer, pointer, pointer), None
    lib.ttsk_plan_write.argtypes, lib.ttsk_plan_write.restype = (pointer,), None
    lib.ttsk_plan_advance.argtypes, lib.ttsk_plan_advance.restype = (pointer,), ctypes.c_int32
    lib.ttsk_tree_from_block_tables.argtypes = (pointer, pointer, pointer, *[ctypes.c_int32] * 3, pointer)
    lib.ttsk_tree_from_block_tables.restype = ctypes.c_int64
    return lib


@functools.lru_cache(maxsize=64)
def _packed_costs(costs: at.Costs) -> ctypes.Array:
    return (ctypes.c_double * len(costs))(*costs)


def _build_cpu(packed: np.ndarray, costs: at.Costs, reuse: Plan | None) -> Plan:
    lib = _library()
    sizes, us = (ctypes.c_int64 * 7)(), (ctypes.c_double * 2)()
    lib.ttsk_plan_compute(packed.ctypes.data, _packed_costs(costs), sizes, us)
    plan = _room(Sizes(*sizes[:4]), costs.queues, reuse, "cpu")
    lib.ttsk_plan_write(plan._address)
    plan._stats = PlanStats(sizes[1], sizes[4], sizes[5], sizes[6], us[0], us[1])
    return plan
