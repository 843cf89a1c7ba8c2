"""The plan buffer's layout, NumPy twin of csrc/include/ttskernels/plan.h, and a planner's input."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MAGIC = 0x4B535454
VERSION = 1
PARTIAL_TOKENS = 512
TILE_TOKENS = 64
RUN_TOKENS = 64
HEADER_INTS = 32
FOLD, FOLLOWS = 1, 2  # PlanItem.flags

(
    MAGIC_AT, VERSION_AT, TOTAL_INTS, PAGE_SIZE_AT,
    NUM_ROWS, NUM_ITEMS, NUM_SEGS, NUM_SLOTS, NUM_MERGES, NUM_WORKERS,
    CAP_ROWS, CAP_ITEMS, CAP_SEGS, CAP_MERGES,
    ROW_POS, ROW_SLOT, ROW_PERM, ROW_LEAF, ITEMS, SEGS, MERGE_INDPTR, MERGE_SLOTS, WORKER_INDPTR,
) = range(23)  # fmt: skip
PAGE_BREAKS, LARGE_ITEMS, FOLLOWERS = 24, 25, 26

ITEM_DTYPE = np.dtype(
    [(n, np.int32) for n in ("row_lo", "row_n", "seg_lo", "seg_n", "pos0", "slot", "flags", "tokens")]
)
SEG_DTYPE = np.dtype([(n, np.int32) for n in ("page", "offset", "count", "left")])


@dataclass(frozen=True)
class HeadShape:
    """Attention heads of one layer; `kv_bytes` is the size of one stored K or V element, with its share of a scale."""

    q_heads: int
    kv_heads: int
    head_dim: int
    v_dim: int
    kv_bytes: float

    def __post_init__(self):
        if min(self.q_heads, self.kv_heads, self.head_dim, self.v_dim, self.kv_bytes) <= 0:
            raise ValueError(f"every field of HeadShape must be positive, got {self}")
        if self.q_heads % self.kv_heads:
            raise ValueError(
                f"q_heads must be a multiple of kv_heads, got {self.q_heads} and {self.kv_heads}"
            )


@dataclass(frozen=True)
class Machine:
    """Cost constants of the planner. Defaults: two Sapphire Rapids cores, fp32 FMA (docs/decisions.md)."""

    workers: int = 2  # cores or thread blocks that run items at the same time
    queues: int = 1  # item lists: 1 if workers pull from one counter, `workers` if each has its own list
    flops_per_second: float = (
        345e9  # of all workers, at full tiles of `tile_rows` (row, query head of a group) rows
    )
    bytes_per_second: float = 21e9  # KV reads of all workers
    partial_bytes_per_second: float = 40e9  # partial results, written and read back, mostly in cache
    item_us: float = 2.0  # fixed cost of an item, all its heads
    tile_rows: int = 6
    block_rows: int = 256  # most (row, query head of a group) rows of one item
    tasks_per_worker: int = 4  # split long items until there are about this many (item, kv head) tasks
    min_piece_us: float = 20.0  # but never below this much work
    fold: bool = False  # for GPUs: one record a row and item, not one a partial, and items of two sizes (`tile_rows`)
    walks: bool = True  # for CPUs: items that follow each other instead of records, where there are rows enough

    def __post_init__(self):
        if any(v <= 0 for k, v in vars(self).items() if k not in ("fold", "walks")) or self.queues not in (1, self.workers):
            raise ValueError(f"every field of Machine must be positive and queues 1 or workers, got {self}")
        if self.fold and self.queues > 1:
            raise ValueError(f"queues must be 1 where items fold, got {self}")


class Costs(NamedTuple):
    """Microseconds of one worker, as the planner uses them. An item costs item_us + tokens * rate(rows)."""

    item_us: float
    byte_us: float  # reading one token's K and V of every head
    flop_us: float  # one query head row of every group times one token
    partial_us: float  # one row's partial record, all heads
    min_piece_us: float
    group: int
    tile_rows: int
    block_rows: int  # in rows, not (row, head) pairs
    kv_heads: int
    workers: int
    tasks: int
    queues: int
    fold: bool
    walks: bool


@functools.lru_cache(maxsize=64)
def cost_constants(heads: HeadShape, machine: Machine) -> Costs:
    group = heads.q_heads // heads.kv_heads
    width = heads.head_dim + heads.v_dim
    us = machine.workers * 1e6
    return Costs(
        item_us=machine.item_us,
        byte_us=us * heads.kv_heads * width * heads.kv_bytes / machine.bytes_per_second,
        flop_us=us * 2 * heads.kv_heads * width / machine.flops_per_second,
        partial_us=us * heads.q_heads * (heads.v_dim + 1) * 8 / machine.partial_bytes_per_second,
        min_piece_us=machine.min_piece_us,
        group=group,
        tile_rows=machine.tile_rows,
        block_rows=max(1, machine.block_rows // group),
        kv_heads=heads.kv_heads,
        workers=machine.workers,
        tasks=machine.workers * machine.tasks_per_worker,
        queues=machine.queues,
        fold=machine.fold,
        walks=machine.walks and not machine.fold and machine.queues == 1,
    )


class TreeSpec(NamedTuple):
    """A planner's input: nodes in topological order (a parent before its children), packed int32.

    The rows below a node read its `length` tokens; its own row may advance through its `capacity` slots.
    """

    packed: np.ndarray
    page_size: int
    parent: np.ndarray
    length: np.ndarray
    capacity: np.ndarray
    cached: np.ndarray
    first_offset: np.ndarray
    page_indptr: np.ndarray
    pages: np.ndarray
    row_node: np.ndarray
    row_pos: np.ndarray


def unpack_spec(packed: np.ndarray) -> TreeSpec:
    """Views of `[nodes, rows, pages, page_size, parent.., length.., capacity.., cached.., first_offset..,
    page_indptr.., pages.., row_node.., row_pos..]`."""
    nodes, rows, pages, page_size = packed[:4].tolist()
    sizes = (nodes, nodes, nodes, nodes, nodes, nodes + 1, pages, rows, rows)
    views, at = [], 4
    for size in sizes:
        views.append(packed[at : at + size])
        at += size
    return TreeSpec(packed, page_size, *views)


class PlanStats(NamedTuple):
    """`modelled_us` is the planner's estimate for one layer's attention, `flat_us` for one path per row."""

    items: int
    partial_slots: int
    unique_tokens: int
    flat_tokens: int
    modelled_us: float
    flat_us: float


class Sizes(NamedTuple):
    rows: int
    items: int
    segs: int
    merges: int


def capacities(need: Sizes) -> Sizes:
    """Capacities of a new buffer: powers of two from 16 on, so that a growing tree rarely needs another."""
    return Sizes(*(1 << max(4, (n - 1).bit_length()) for n in need))


def section_offsets(cap: Sizes, queues: int) -> tuple[list[int], int]:
    """Offset of each section from ROW_POS on, each a multiple of 16 int32, and the buffer's size."""
    sizes = (
        cap.rows,
        cap.rows,
        cap.rows,
        4 * cap.rows,
        8 * cap.items,
        4 * cap.segs,
        cap.rows + 1,
        cap.merges,
        queues + 1,
    )
    offsets, at = [], HEADER_INTS
    for size in sizes:
        offsets.append(at)
        at += (size + 15) // 16 * 16
    return offsets, at


def section(plan: np.ndarray, field: int) -> np.ndarray:
    """The used part of one section: items and segments as structured arrays, the rest as int32."""
    rows = int(plan[NUM_ROWS])
    size = {
        ROW_LEAF: 4 * rows,
        ITEMS: 8 * int(plan[NUM_ITEMS]),
        SEGS: 4 * int(plan[NUM_SEGS]),
        MERGE_INDPTR: rows + 1,
        MERGE_SLOTS: int(plan[NUM_MERGES]),
        WORKER_INDPTR: int(plan[NUM_WORKERS]) + 1,
    }.get(field, rows)
    part = plan[int(plan[field]) :][:size]
    return part.view({ITEMS: ITEM_DTYPE, SEGS: SEG_DTYPE}.get(field, np.int32))
