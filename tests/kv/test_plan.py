import random

import numpy as np
import pytest
from forests import decode_rows, mixed_rows, random_forest

from ttskernels.errors import ReleasedNodeError
from ttskernels.kv import HeadShape, Machine, build_plan, plan_from_parents
from ttskernels.kv import plan_layout as at
from ttskernels.kv.coverage import RowView, check_coverage, expected_of_rows

HEADS = [
    HeadShape(4, 2, 64, 64, 2),
    HeadShape(28, 4, 128, 128, 2),
    HeadShape(8, 8, 32, 64, 4),
    HeadShape(7, 1, 80, 80, 2),
]
# Cheap items: much is separated and cut. Dear ones: much is pushed down. Dear records: much is walked. Many workers with
# own queues.
MACHINES = [
    Machine(),
    Machine(
        item_us=1e-4, partial_bytes_per_second=1e15, min_piece_us=1e-6, tasks_per_worker=64, block_rows=16
    ),
    Machine(item_us=5.0, partial_bytes_per_second=1e9, walks=False),
    Machine(workers=3, partial_bytes_per_second=1e7, block_rows=20),
    Machine(workers=9, fold=True, item_us=0.5, min_piece_us=0.1, tile_rows=16, block_rows=64, tasks_per_worker=8),
    Machine(
        workers=132, queues=132, flops_per_second=6e14, bytes_per_second=3e12, tile_rows=16, min_piece_us=0.01
    ),
]
SECTIONS = (at.ROW_POS, at.ROW_SLOT, at.ROW_PERM, at.ROW_LEAF, at.ITEMS, at.SEGS,
            at.MERGE_INDPTR, at.MERGE_SLOTS, at.WORKER_INDPTR)  # fmt: skip
IMPLS = ["reference", "cpu"]


def assert_same_plan(a, b):
    assert np.array_equal(a.buffer[: at.HEADER_INTS].numpy(), b.buffer[: at.HEADER_INTS].numpy())
    for field in SECTIONS:
        assert np.array_equal(a.section(field), b.section(field)), field
    assert a.stats() == b.stats()


def random_case(seed):
    rng = random.Random(seed)
    lengths = (0, 1, 17, 40, 600, 1100) if seed % 3 == 0 else (0, 1, 5, 16, 17, 60, 200)
    forest, leaves = random_forest(rng, lengths=lengths, depth=rng.randrange(1, 5), roots=rng.randrange(1, 4))
    leaves = leaves[:12] if max(lengths) > 1000 else leaves[:30]
    rows = mixed_rows(rng, forest, leaves) if seed % 2 else decode_rows(rng.sample(leaves, len(leaves)))
    return forest, rows, HEADS[seed % len(HEADS)], MACHINES[seed // 2 % len(MACHINES)]


@pytest.mark.parametrize("seed", range(32))
def test_coverage(seed, impl):
    forest, rows, heads, machine = random_case(seed)
    plan = build_plan(forest, rows, heads, machine=machine, impl=impl)
    check_coverage(plan, expected_of_rows(forest, rows))
    stats = plan.stats()
    assert stats.modelled_us <= stats.flat_us * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(200))
def test_planners_agree(seed, cpu_extension):
    forest, rows, heads, machine = random_case(seed)
    plans = [build_plan(forest, rows, heads, machine=machine, impl=impl) for impl in IMPLS]
    assert_same_plan(*plans)


@pytest.mark.parametrize("seed", range(8))
def test_advance_equals_rebuild(seed, impl):
    rng = random.Random(seed)
    forest, leaves = random_forest(rng, lengths=(0, 3, 17, 509, 530))
    rows = decode_rows(leaves)
    heads, machine = HEADS[0], MACHINES[seed % len(MACHINES)]
    plan = build_plan(forest, rows, heads, machine=machine, impl=impl)
    steps = min(leaf.capacity - len(leaf.ids) for leaf in leaves)
    for _ in range(min(steps, 40)):
        assert plan.advance()
        for leaf in leaves:
            forest.append(leaf, [1])
            leaf.cached += 1  # the decoder wrote the row's KV
        rows = decode_rows(leaves)
        fresh = build_plan(forest, rows, heads, machine=machine, impl=impl)
        assert np.array_equal(plan.row_pos, fresh.row_pos) and np.array_equal(plan.row_slot, fresh.row_slot)
        assert all(s // 16 in leaf.pages for s, leaf in zip(plan.row_slot, leaves, strict=False))
    check_coverage(plan, expected_of_rows(forest, rows))


def test_advance_stops_at_the_end_of_the_slots(impl):
    forest, leaves = random_forest(random.Random(3))
    plan = build_plan(forest, decode_rows(leaves), HEADS[0], impl=impl)
    steps = min(leaf.capacity - len(leaf.ids) for leaf in leaves)
    assert [plan.advance() for _ in range(steps)] == [True] * steps
    before = plan.buffer.clone()
    assert not plan.advance() and plan.buffer.equal(before)


@pytest.mark.parametrize("seed", range(8))
def test_of_rows(seed, impl):
    """Any rows of a plan, in any order, some twice: each reads what it read; the plan itself stays."""
    forest, rows, heads, machine = random_case(seed)
    plan = build_plan(forest, rows, heads, machine=machine, impl=impl)
    views, before = expected_of_rows(forest, rows), plan.buffer.clone()
    for count in (0, 1, plan.num_rows // 3, plan.num_rows + 5):
        chosen = random.Random(seed + count).choices(range(plan.num_rows), k=count)
        part = plan.of_rows(chosen)
        assert part.num_rows == count and np.array_equal(part.row_pos, plan.row_pos[chosen])
        check_coverage(part, [views[i] for i in chosen])
    assert plan.buffer.equal(before)


def test_of_rows_after_advance(impl):
    forest, leaves = random_forest(random.Random(5), lengths=(3, 17, 509, 530))
    plan = build_plan(forest, decode_rows(leaves), HEADS[0], impl=impl)
    assert plan.advance() and plan.advance()
    for leaf in leaves:
        forest.append(leaf, [1, 2])
    chosen = list(range(0, len(leaves), 2))
    check_coverage(plan.of_rows(chosen), expected_of_rows(forest, decode_rows([leaves[i] for i in chosen])))


def test_inner_and_several_rows_do_not_advance(impl):
    forest, leaves = random_forest(random.Random(3))
    inner = next(n for n in forest.path(leaves[0]) if n.sealed and n.ids)
    for rows in ([(inner, len(inner.ids) - 1, 1)], [(leaves[0], 0, len(leaves[0].ids))]):
        assert not build_plan(forest, rows, HEADS[0], impl=impl).advance() or len(leaves[0].ids) == 1


@pytest.mark.parametrize("seed", range(6))
def test_split_and_row_order_keep_coverage(seed, impl):
    forest, rows, heads, machine = random_case(2 * seed)
    plain = expected_of_rows(forest, rows)
    long = [n for n in {p for leaf, _, _ in rows for p in forest.path(leaf)} if len(n.ids) > 1 and n.sealed]
    for node in long:
        forest.split(node, len(node.ids) // 3 + 1)
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    rows = [rows[i] for i in order]
    views = expected_of_rows(forest, rows)
    assert all(np.array_equal(v.slots, plain[i].slots) for v, i in zip(views, order, strict=False))
    check_coverage(build_plan(forest, rows, heads, machine=machine, impl=impl), views)


@pytest.mark.parametrize("seed", range(6))
def test_parents_equal_forest(seed, impl):
    rng = random.Random(seed)
    forest, leaves = random_forest(rng)
    rows = decode_rows(leaves)
    nodes = []
    for leaf in leaves:
        nodes += [n for n in forest.path(leaf) if n not in nodes]
    pages = [n.pages for n in nodes]
    plan = plan_from_parents(
        [-1 if n.parent is None else nodes.index(n.parent) for n in nodes],
        [len(n.ids) for n in nodes],
        np.cumsum([0, *map(len, pages)]),
        [p for part in pages for p in part],
        [nodes.index(leaf) for leaf in leaves],
        [forest.length(leaf) - 1 for leaf in leaves],
        HEADS[1],
        first_offset=[n.first_offset for n in nodes],
        cached=[n.cached for n in nodes],
        impl=impl,
    )
    assert_same_plan(plan, build_plan(forest, rows, HEADS[1], impl=impl))


def test_reuse_and_growth(impl):
    forest, leaves = random_forest(random.Random(1), fan_out=5)
    assert len(leaves) > 20
    small = build_plan(forest, decode_rows(leaves[:3]), HEADS[0], impl=impl)
    address = small.buffer.data_ptr()
    again = build_plan(forest, decode_rows(leaves[1:3]), HEADS[0], reuse=small, impl=impl)
    assert again is small and again.buffer.data_ptr() == address
    check_coverage(again, expected_of_rows(forest, decode_rows(leaves[1:3])))
    big = build_plan(forest, decode_rows(leaves), HEADS[0], reuse=small, impl=impl)
    assert big is not small and big.buffer.numel() > small.buffer.numel()
    check_coverage(big, expected_of_rows(forest, decode_rows(leaves)))


def shared_prefix(prefix, leaves, suffix):
    """plan_from_parents arguments: one root of `prefix` tokens, `leaves` children of `suffix` tokens,
    16-token pages."""
    root, each = -(-prefix // 16), -(-suffix // 16)
    indptr = [0, *range(root, root + leaves * each + 1, each)]
    parent, length = [-1] + [0] * leaves, [prefix] + [suffix] * leaves
    pages = list(range(indptr[-1]))
    return parent, length, indptr, pages, list(range(1, leaves + 1)), [prefix + suffix - 1] * leaves


def test_choices(impl):
    heads = HEADS[1]
    shared = plan_from_parents(*shared_prefix(4096, 64, 64), heads, impl=impl)
    assert shared.stats().modelled_us < shared.stats().flat_us / 2
    assert shared.section(at.ITEMS)["row_n"].max() > 1
    assert shared.stats().partial_slots == 0 and len(shared.section(at.MERGE_SLOTS)) == 0
    with pytest.raises(ValueError, match=r"made for a CPU \(64 of its items follow others\).*gpu_machine"):
        shared.to("cpu")  # as on a GPU
    tree = shared_prefix(4096, 64, 64)
    shares = [plan_from_parents(*tree, heads, machine=m, impl=impl) for m in (Machine(walks=False), Machine(workers=64))]
    assert all(p.buffer[at.FOLLOWERS] == 0 and p.stats().partial_slots > 0 for p in shares), "records for many threads"
    flat = plan_from_parents(*shared_prefix(16, 2, 4096), heads, machine=Machine(item_us=50.0, walks=False), impl=impl)
    assert (flat.section(at.ITEMS)["row_n"] == 1).all()
    alone = plan_from_parents(*shared_prefix(700, 1, 20), heads, machine=Machine(min_piece_us=1e9), impl=impl)
    assert (
        alone.stats().items == 1
        and alone.stats().partial_slots == 0
        and len(alone.section(at.MERGE_SLOTS)) == 0
    )
    split = plan_from_parents(*shared_prefix(8192, 1, 20), heads, impl=impl)
    assert split.stats().items > 1  # one long path alone is cut for the second worker
    items = [plan_from_parents(*shared_prefix(n, 1, 20), HeadShape(q, kv, 64, 64, 2), impl=impl).stats().items
             for n, q, kv in ((2048, 14, 2), (2048, 9, 3), (65536, 14, 2))]  # fmt: skip
    assert items[0] == 1 and min(items[1:]) > 1  # not so a short one whose heads are as many for each worker


def test_prefill_reads_only_what_its_rows_see(impl):
    tokens = 2000
    plan = plan_from_parents(
        [-1], [tokens], [0, 125], range(125), [0] * tokens, range(tokens), HEADS[1], cached=[0], impl=impl
    )
    items = plan.section(at.ITEMS)
    assert (items["tokens"] <= items["row_lo"] + items["row_n"] + 15).all()
    assert np.array_equal(plan.row_slot, np.arange(tokens))
    every = np.arange(tokens)
    check_coverage(plan, [RowView(every[: p + 1], np.arange(0, p + 1, 512)) for p in range(tokens)])


def test_empty(impl):
    forest, _ = random_forest(random.Random(0))
    plan = build_plan(forest, [], HEADS[0], impl=impl)
    assert plan.num_rows == 0 and plan.advance() and plan.stats().items == 0
    check_coverage(plan, [])


def test_build_plan_invalid():
    forest, leaves = random_forest(random.Random(0))
    leaf = leaves[0]
    n = len(leaf.ids)
    with pytest.raises(ValueError, match=f"rows: 2 rows from {n - 1} are not within the {n} ids"):
        build_plan(forest, [(leaf, n - 1, 2)], HEADS[0])
    long = next(x for x in leaves if x.capacity > len(x.ids) + 2)
    forest.append(long, [1, 2])
    with pytest.raises(ValueError, match=r"have no KV and no row before this one"):
        build_plan(forest, [(long, len(long.ids) - 1, 1)], HEADS[0])
    child = forest.add(long, [1, 2])
    with pytest.raises(ValueError, match="call reserve first"):
        build_plan(forest, [(child, 0, 2)], HEADS[0])
    forest.reserve([child], 0)
    with pytest.raises(ValueError, match="on a row's path, have neither KV nor a row"):
        build_plan(forest, [(child, 0, 2)], HEADS[0])
    build_plan(forest, [(child, 0, 2), (long, long.cached, len(long.ids) - long.cached)], HEADS[0])
    with pytest.raises(ValueError, match="impl of a planner"):
        build_plan(forest, [], HEADS[0], impl="triton")
    forest.release(child)
    with pytest.raises(ReleasedNodeError):
        build_plan(forest, [(child, 0, 2)], HEADS[0])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"parent": [0, -1]}, r"parent\[0\] must be -1 or a node before 0, got 0"),
        ({"length": [40, 8]}, "node 0: 40 tokens from slot 0 on need pages of 16, got 2 pages"),
        ({"page_indptr": [0, 2, 4]}, r"page_indptr must rise from 0 to len\(pages\) = 3"),
        ({"pages": [0, 1]}, r"page_indptr must rise from 0 to len\(pages\) = 2"),
        ({"row_node": [2]}, r"row_node\[0\] must be in 0..1, got 2"),
        ({"row_pos": [28]}, r"row_pos\[0\] must be in its node's 20..27, got 28"),
        ({"row_pos": [28, 29]}, "row_pos must have 1 entries for 2 nodes and 1 rows, got 2"),
        ({"page_size": 0}, "page_size must be positive, got 0"),
    ],
)
def test_plan_from_parents_invalid(change, message):
    tree = {
        "parent": [-1, 0],
        "length": [20, 8],
        "page_indptr": [0, 2, 3],
        "pages": [0, 1, 2],
        "row_node": [1],
        "row_pos": [27],
    }
    plan_from_parents(**tree, heads=HEADS[0])
    with pytest.raises(ValueError, match=message):
        plan_from_parents(**(tree | change), heads=HEADS[0])


def test_shapes_invalid():
    with pytest.raises(ValueError, match="q_heads must be a multiple of kv_heads, got 5 and 2"):
        HeadShape(5, 2, 64, 64, 2)
    with pytest.raises(ValueError, match="every field of HeadShape must be positive"):
        HeadShape(4, 2, 64, 0, 2)
    with pytest.raises(ValueError, match="queues 1 or workers"):
        Machine(workers=4, queues=2)
