"""Plans from an engine's block tables: sequences that start with the same pages become one tree."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ttskernels.kv.plan import Plan, _build, _library, _resolve
from ttskernels.kv.plan_layout import HeadShape, Machine


def plan_from_block_tables(
    block_table: ArrayLike,
    seq_lens: ArrayLike,
    page_size: int,
    heads: HeadShape,
    *,
    query_lens: ArrayLike | None = None,
    machine: Machine | None = None,
    reuse: Plan | None = None,
    impl: str = "auto",
) -> Plan:
    """Plan over paged sequences (vLLM, SGLang, transformers): equal leading page ids are read once.

    Args:
        block_table: `[sequences, max_pages]` int32 page ids; entries past a sequence's pages are ignored.
        seq_lens: `[sequences]` tokens with KV, the last page partly used; the engine has written the KV of
            the query tokens, so every row_slot is -1 and the plan does not advance.
        query_lens: `[sequences]` query rows, the last tokens of each sequence (1 each). Rows are in sequence
            order.
    Raises:
        ValueError: shapes, or a length that the table's width does not hold.
    """
    table = np.ascontiguousarray(block_table, np.int32)
    lens = np.ascontiguousarray(seq_lens, np.int32)
    queries = np.ones_like(lens) if query_lens is None else np.ascontiguousarray(query_lens, np.int32)
    if table.ndim != 2 or lens.shape != table.shape[:1] or queries.shape != lens.shape:
        raise ValueError(
            "block_table must be [sequences, max_pages], seq_lens and query_lens [sequences], "
            f"got {table.shape}, {lens.shape}, {queries.shape}"
        )
    if page_size < 1:
        raise ValueError(f"page_size must be positive, got {page_size}")
    most = table.shape[1] * page_size
    bad = np.flatnonzero((lens < 1) | (lens > most) | (queries < 0) | (queries > lens))
    if bad.size:
        raise ValueError(
            f"sequence {bad[0]}: seq_lens must be in 1..{most} and query_lens in 0..seq_lens, "
            f"got {lens[bad[0]]} and {queries[bad[0]]}; leave padding out"
        )
    tree = _tree_cpu if _resolve(impl) == "cpu" else tree_reference
    return _build(tree(table, lens, queries, page_size), heads, machine, reuse, impl)


def tree_reference(table: np.ndarray, lens: np.ndarray, queries: np.ndarray, page_size: int) -> np.ndarray:
    """The packed TreeSpec: sequences sorted by pages, a node for each run that a range shares."""
    count = len(lens)
    num_pages = (-(-lens // page_size)).tolist()
    order = sorted(range(count), key=lambda b: table[b, : num_pages[b]].tolist())
    shared = [0] * count  # leading pages that sorted sequence i has in common with i - 1
    for i in range(1, count):
        a, b = order[i - 1], order[i]
        n = min(num_pages[a], num_pages[b])
        differ = np.flatnonzero(table[a, :n] != table[b, :n])
        shared[i] = int(differ[0]) if differ.size else n
    parent, length, indptr, pages = [], [], [0], []
    end_node = [-1] * count
    stack = [(0, count, 0, -1)] if count else []  # sorted range, pages above, node above
    while stack:
        lo, hi, depth, above = stack.pop()
        end = min(shared[lo + 1 : hi], default=num_pages[order[lo]])
        node = above
        if end > depth:
            node = len(parent)
            parent.append(above)
            longest = max(int(lens[order[i]]) for i in range(lo, hi))
            length.append(min(end * page_size, longest) - depth * page_size)
            pages += table[order[lo], depth:end].tolist()
            indptr.append(len(pages))
        groups = []
        for i in range(lo, hi):
            if num_pages[order[i]] == end:
                end_node[order[i]] = node
            elif groups and shared[i] > end:
                groups[-1][1] = i + 1
            else:
                groups.append([i, i + 1])
        stack += [(a, b, end, node) for a, b in reversed(groups)]
    pos0 = [0] * len(parent)
    for v, up in enumerate(parent):
        pos0[v] = 0 if up < 0 else pos0[up] + length[up]
    row_node, row_pos = [], []
    for b in range(count):
        for pos in range(int(lens[b] - queries[b]), int(lens[b])):
            v = end_node[b]
            while pos < pos0[v]:
                v = parent[v]
            row_node.append(v)
            row_pos.append(pos)
    sizes = [len(parent), len(row_node), len(pages), page_size]
    zeros = [0] * len(parent)
    return np.array(
        [*sizes, *parent, *length, *length, *length, *zeros, *indptr, *pages, *row_node, *row_pos], np.int32
    )


def _tree_cpu(table: np.ndarray, lens: np.ndarray, queries: np.ndarray, page_size: int) -> np.ndarray:
    count, width = table.shape
    most = 5 + 12 * count + int((-(-lens // page_size)).sum()) + 2 * int(queries.sum())
    packed = np.empty(most, np.int32)
    used = _library().ttsk_tree_from_block_tables(
        table.ctypes.data, lens.ctypes.data, queries.ctypes.data, count, width, page_size, packed.ctypes.data
    )
    return packed[:used]
