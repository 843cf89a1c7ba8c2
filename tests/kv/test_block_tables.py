import random

import numpy as np
import pytest

from ttskernels.kv import HeadShape, plan_from_block_tables, plan_from_parents
from ttskernels.kv import plan_layout as at
from ttskernels.kv.coverage import RowView, check_coverage

HEADS = HeadShape(8, 2, 64, 64, 2)


def random_tables(seed):
    """Sequences that copy a random part of an earlier one's leading pages."""
    rng = random.Random(seed)
    page_size = rng.choice([1, 16, 48, 256])
    fresh = iter(rng.sample(range(100_000), 5_000))
    tables: list[list[int]] = []
    for _ in range(rng.randrange(1, 20)):
        start = rng.choice(tables)[: rng.randrange(12)] if tables and rng.random() < 0.8 else []
        tables.append(start + [next(fresh) for _ in range(rng.randrange(0 if start else 1, 8))])
    if seed % 2:
        tables += rng.sample(tables, 1)  # the same sequence twice
    lens = [len(t) * page_size - rng.randrange(page_size) for t in tables]
    queries = [min(n, rng.choice([0, 1, 1, 2, 9])) for n in lens]
    width = max(map(len, tables)) + 2
    table = np.array([t + [-7] * (width - len(t)) for t in tables], np.int32)
    return table, lens, queries, page_size


def visible_slots(table, lens, queries, page_size):
    views = []
    for b, (n, q) in enumerate(zip(lens, queries, strict=False)):
        token = np.arange(n)
        slots = table[b, token // page_size].astype(np.int64) * page_size + token % page_size
        views += [slots[: p + 1] for p in range(n - q, n)]
    return views


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("seed", range(20))
def test_block_tables(seed, impl, request):
    if impl == "cpu":
        request.getfixturevalue("cpu_extension")
    table, lens, queries, page_size = random_tables(seed)
    plan = plan_from_block_tables(table, lens, page_size, HEADS, query_lens=queries, impl=impl)
    views = visible_slots(table, lens, queries, page_size)
    assert (plan.row_slot == -1).all() and (plan.num_rows == 0 or not plan.advance())
    check_coverage(
        plan,
        [
            RowView(v, begins)
            for v, begins in zip(views, partial_starts(table, lens, queries, page_size), strict=False)
        ],
    )


def partial_starts(table, lens, queries, page_size):
    """Nodes by brute force: a node ends where a sequence parts from another, or another ends."""
    num_pages = [-(-n // page_size) for n in lens]
    rows = [table[b, :n].tolist() for b, n in enumerate(num_pages)]
    for b, q in enumerate(queries):
        borders = {0}
        for other in rows:
            n = next(
                (i for i, (x, y) in enumerate(zip(rows[b], other, strict=False)) if x != y),
                min(len(rows[b]), len(other)),
            )
            # a border where the two part: at a difference, or where the shorter ends and the longer goes on
            if n < len(rows[b]):
                borders.add(n)
        borders = sorted(borders)
        for p in range(lens[b] - q, lens[b]):
            starts = []
            for lo, hi in zip(borders, [*borders[1:], len(rows[b])], strict=False):
                starts += range(lo * page_size, hi * page_size, 512)
            yield np.array([s for s in starts if s <= p], np.int64)


@pytest.mark.parametrize("seed", range(40))
def test_block_table_planners_agree(seed, cpu_extension):
    table, lens, queries, page_size = random_tables(seed)
    a, b = (
        plan_from_block_tables(table, lens, page_size, HEADS, query_lens=queries, impl=i)
        for i in ("reference", "cpu")
    )
    assert np.array_equal(a.buffer[:32].numpy(), b.buffer[:32].numpy())
    for field in (at.ROW_POS, at.ROW_PERM, at.ITEMS, at.SEGS, at.MERGE_SLOTS):
        assert np.array_equal(a.section(field), b.section(field)), field


def test_block_tables_equal_parents():
    table = [[5, 6, 7, 8], [5, 6, 9, 0], [5, 6, 7, 3]]
    plan = plan_from_block_tables(table, [64, 48, 64], 16, HEADS)
    # sorted by pages: [5 6 7 3], [5 6 7 8], [5 6 9]
    parents = plan_from_parents(
        [-1, 0, 1, 1, 0],
        [32, 16, 16, 16, 16],
        [0, 2, 3, 4, 5, 6],
        [5, 6, 7, 3, 8, 9],
        [3, 4, 2],
        [63, 47, 63],
        HEADS,
    )
    for field in (at.ROW_POS, at.ROW_PERM, at.ITEMS, at.MERGE_SLOTS):
        assert np.array_equal(plan.section(field), parents.section(field)), field


def test_block_tables_invalid():
    table = np.zeros((2, 3), np.int32)
    with pytest.raises(
        ValueError, match=r"seq_lens and query_lens \[sequences\], got \(2, 3\), \(1,\), \(1,\)"
    ):
        plan_from_block_tables(table, [5], 16, HEADS)
    for lens in ([5, 0], [5, 49]):
        with pytest.raises(
            ValueError, match=rf"sequence 1: seq_lens must be in 1..48 .* got {lens[1]} and 1; leave padding"
        ):
            plan_from_block_tables(table, lens, 16, HEADS)
    with pytest.raises(ValueError, match="got 5 and 6"):
        plan_from_block_tables(table, [5, 5], 16, HEADS, query_lens=[6, 1])
    with pytest.raises(ValueError, match="page_size must be positive, got 0"):
        plan_from_block_tables(table, [5, 5], 0, HEADS)
