"""tree_attention on a GPU: every tile, dtype and kind of plan, captured launches under changing plans, large pools."""

import random

import pytest
import torch
from attention import DEEP, DEEP_ROWS, expected, make
from budget import assert_within_budget, to_float64
from plans import MODES, build_plan, make_trees, planned, random_trees

pytest.importorskip("triton", reason="triton is not installed")

from ttskernels._reference import tree_attention as reference
from ttskernels._triton import workspace
from ttskernels._triton.tiles import BOX_TABLE, Tile, Tiles, architecture, lookup
from ttskernels._triton.tree_attention import tree_attention as launch
from ttskernels.attention_launches import attention_launches
from ttskernels.kv import Forest, HeadShape, PagePool
from ttskernels.kv import build_plan as plan_forest
from ttskernels.kv.machines import gpu_machine
from ttskernels.ops.tree_attention import tree_attention

pytestmark = pytest.mark.gpu
SINGLE = [Tile(16, 32, 2, 3, 4), Tile(16, 128, 2, 2), Tile(16, 64, 4, 3), Tile(64, 64, 4, 3), Tile(128, 64, 8, 3, 1),
          Tile(128, 128, 8, 2, 1)]  # fmt: skip
TILES = [Tiles(tile, tile) for tile in SINGLE]
SHAPES = [(8, 2, 64, 64), (6, 3, 80, 80), (4, 1, 96, 96), (28, 4, 128, 128), (5, 1, 128, 128), (6, 2, 192, 128), (8, 1, 256, 256)]
# The plans of plans.build_plan have no large items: the tiles for those take the place of the others.
LARGE_ALONE = pytest.mark.parametrize("large_alone", [True, False], ids=["large", "small"])


def tiles_of(device, head_dim, v_dim, kv_bytes, large_alone, boxes=None):
    """Those of the tables, or the one for large items alone."""
    tiles = boxes or lookup(architecture(device), head_dim, v_dim, kv_bytes)
    return Tiles(tiles.large, tiles.large) if large_alone else tiles


def run(device, q, k, v, buffer, tiles=None, scales=(None, None), tma=False, **options):
    """(out, lse) of a launch whose output held NaN before."""
    q, k, v, plan = (t.to(device) for t in (q, k, v, buffer))
    out = torch.full((*q.shape[:2], v.shape[3]), float("nan"), dtype=q.dtype, device=device)
    settings = {"softcap": 0.0, "window": 0, "sinks": None} | options
    of_heads = (None if t is None else t.to(device) for t in (settings["sinks"], *scales))
    lse = launch(q, k, v, plan, buffer[:32].tolist(), q.shape[2] ** -0.5, settings["softcap"], settings["window"],
                 *of_heads, out, tiles, tma)  # fmt: skip
    return out.cpu(), lse.cpu()


def check(device, trees, shape, dtype, plan, tiles=None, **options):
    q_heads, kv_heads, head_dim, v_dim = shape
    q, k, v = make(trees, q_heads, kv_heads, head_dim, dtype, v_dim, packed=False)
    exact, exact_lse, low, low_lse = expected(q, k, v, plan, head_dim**-0.5, options.get("softcap", 0.0),
                                              options.get("window", 0), options.get("sinks"), {})  # fmt: skip
    out, lse = run(device, q, k, v, plan, tiles, **options)
    assert_within_budget(out, exact, low, factor=3.0)
    assert_within_budget(lse, exact_lse, low_lse, factor=3.0)


@pytest.mark.parametrize("mode", ["separate", "grouped", "prefix"])
@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("shape", [(8, 2, 64, 64), (28, 4, 128, 128)], ids=str)
def test_tiles(device, dtype, shape, tiles, mode):
    copies = 11 if device.type == "cuda" else 1
    trees = make_trees(DEEP, [row for row in DEEP_ROWS for _ in range(copies)])
    check(device, trees, shape, dtype, build_plan(trees, mode), tiles)


@LARGE_ALONE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_head_sizes_under_every_plan(device, dtype, shape, mode, large_alone):
    trees = random_trees(sum(shape))
    if large_alone:
        trees.rows = [row for row in trees.rows for _ in range(9)]
    check(device, trees, shape, dtype, build_plan(trees, mode), tiles_of(device, *shape[2:], dtype.itemsize, large_alone))


OPTIONS = [{"softcap": 5.0, "window": 70, "sinks": True}, {"window": 70}, {"softcap": 5.0}, {"sinks": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o))
@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_options(device, dtype, options, tiles):
    trees = make_trees(DEEP, DEEP_ROWS)
    if "sinks" in options:
        options = options | {"sinks": torch.linspace(-4, 6, 28)}
    check(device, trees, (28, 4, 128, 128), dtype, build_plan(trees), tiles, **options)


@pytest.mark.parametrize("seed", range(40))
def test_random_forests(device, dtype, seed):
    trees = random_trees(seed + 100, page_size=random.Random(seed).choice([1, 16, 64]), max_length=700)
    check(device, trees, SHAPES[seed % len(SHAPES)], dtype, build_plan(trees, MODES[seed % len(MODES)], seed))


@LARGE_ALONE
@pytest.mark.parametrize("mode", ["separate", "prefix"])
@pytest.mark.parametrize("window", [0, 70])
@pytest.mark.parametrize("entry", [e for e in BOX_TABLE if e[0] == "sm_90"], ids=str)
def test_boxes_of_rows(device, dtype, entry, window, mode, large_alone):
    """TMA: nodes on consecutive pages; NaN in every unused slot."""
    if device.type == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("this GPU has no tensor memory accelerator")
    trees = make_trees(DEEP, [row for row in DEEP_ROWS for _ in range(5)], shuffled=False)
    _, head_dim, size = entry
    kv_dtype = torch.float8_e4m3fn if size == 1 else dtype
    q, k, v = make(trees, 8, 2, head_dim, dtype, packed=False, kv_dtype=kv_dtype)
    plan, scale = build_plan(trees, mode), head_dim**-0.5
    scales = (torch.tensor([0.5, 2.0]), torch.tensor([1.5, 0.25])) if size == 1 else (None, None)
    wide = to_float64(q, k.float(), v.float())
    exact, exact_lse = reference.tree_attention(*wide, plan, scale, 0.0, window, None, *scales)
    low, low_lse = reference.tree_attention(q, k, v, plan, scale, 0.0, window, None, *scales)
    tiles = tiles_of(device, head_dim, head_dim, size, large_alone, BOX_TABLE[entry])
    out, lse = run(device, q, k, v, plan, tiles, scales, True, window=window)
    assert_within_budget(out, exact, low, factor=4.0)
    assert_within_budget(lse, exact_lse, low_lse, factor=4.0)


def check_float8(device, dtype, trees, head_dim, kv_dtype, plan, tiles=None, tma=False):
    q, k, v = make(trees, 8, 2, head_dim, dtype, packed=False, kv_dtype=kv_dtype)
    scales, scale = (torch.tensor([0.5, 2.0]), torch.tensor([1.5, 0.25])), head_dim**-0.5
    wide = to_float64(q, k.float(), v.float())
    exact, exact_lse = reference.tree_attention(*wide, plan, scale, 0.0, 0, None, *scales)
    low, low_lse = reference.tree_attention(q, k, v, plan, scale, 0.0, 0, None, *scales)
    out, lse = run(device, q, k, v, plan, tiles, scales, tma)
    assert_within_budget(out, exact, low, factor=4.0)
    assert_within_budget(lse, exact_lse, low_lse, factor=4.0)


@LARGE_ALONE
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8(device, dtype, kv_dtype, head_dim, large_alone):
    trees = make_trees(DEEP, [row for row in DEEP_ROWS for _ in range(5 if large_alone else 1)])
    tiles = tiles_of(device, head_dim, head_dim, 1, large_alone)
    check_float8(device, dtype, trees, head_dim, kv_dtype, build_plan(trees), tiles)


@pytest.mark.parametrize("shuffled", [False, True])  # boxes, where the tables have them, and gathered pages
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_float8_under_the_planners_own_plan(device, dtype, head_dim, shuffled):
    """Large and small items, in two launches."""
    heads = HeadShape(8, 2, head_dim, head_dim, 1)
    trees = make_trees(DEEP, DEEP_ROWS, shuffled=shuffled)
    plan = planned(trees, heads, gpu_machine(heads))
    launches = attention_launches(plan.header)
    assert launches.large and launches.small and launches.straight == (not shuffled)
    check_float8(device, dtype, trees, head_dim, torch.float8_e4m3fn, plan.buffer, tma=None)


def grown_forest(device, dtype, heads, branches, prompt, pages=400):
    """A forest whose pool holds random K, V everywhere, and its leaves, each with its first token."""
    pool = PagePool(1, heads.kv_heads, heads.head_dim, pages, dtype, device=device, strided=True)
    pool.k.normal_(), pool.v.normal_()
    forest = Forest(pool)
    root = forest.add(None, list(range(prompt)))
    forest.reserve([root], 0)
    forest.mark_cached([root])
    leaves = forest.fork(root, branches)
    forest.reserve(leaves, 24)
    for leaf in leaves:
        forest.append(leaf, [7])
    return forest, pool, leaves


def test_a_captured_launch_serves_later_plans(device, dtype, monkeypatch):
    """Advance and fork under one graph: the same launch, another plan in the same buffer."""
    monkeypatch.setattr(workspace, "_CACHE", workspace.Cache())
    heads = HeadShape(8, 2, 64, 64, 2)
    forest, pool, leaves = grown_forest(device, dtype, heads, 6, 530)
    rows = [(leaf, 0, 1) for leaf in leaves]
    plan = plan_forest(forest, rows, heads, machine=gpu_machine(heads))
    held = plan.to(device)
    q = torch.randn(6, 8, 64, device=device, dtype=dtype)
    out = torch.empty_like(q)

    def replay():
        tree_attention(q, pool.k[0], pool.v[0], held, out=out, impl="triton")

    if device.type == "cuda":
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with pytest.raises(RuntimeError, match="run the same work once in this thread on the capturing"):
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
                replay()
        with torch.cuda.stream(stream):
            replay()
        with torch.cuda.graph(graph, stream=stream):
            replay()
        replay = graph.replay
    k, v = pool.k[0].cpu(), pool.v[0].cpu()
    for turn in range(4):
        if turn == 2:  # other rows, other order: written into the same buffer
            for leaf in leaves:
                forest.append(leaf, [8] * turn)
            forest.mark_cached(leaves)
            rows = [(leaf, turn, 1) for leaf in reversed(leaves)]
            address = plan.buffer.data_ptr()
            plan = plan_forest(forest, rows, heads, machine=gpu_machine(heads), reuse=plan)
            assert plan.buffer.data_ptr() == address
        elif turn:
            assert plan.advance()
        held.upload(plan)
        q.normal_()
        out.fill_(float("nan"))
        replay()
        exact, _, low, _ = expected(q.cpu(), k, v, plan.buffer, 0.125, 0.0, 0, None, {})
        assert_within_budget(out.cpu(), exact, low, factor=3.0)


@pytest.mark.parametrize("branches", [3, 64])
def test_the_same_bits_every_time(device, dtype, branches):
    """Who arrives last changes from launch to launch; the order of the merge must not."""
    heads = HeadShape(28, 4, 128, 128, 2)
    forest, pool, leaves = grown_forest(device, dtype, heads, branches, 1500, pages=300)
    plan = plan_forest(forest, [(leaf, 0, 1) for leaf in leaves], heads, machine=gpu_machine(heads)).to(device)
    q = torch.randn(branches, 28, 128, device=device, dtype=dtype)
    first = tree_attention(q, pool.k[0], pool.v[0], plan, impl="triton").clone()
    for _ in range(200 if device.type == "cuda" else 1):
        assert torch.equal(tree_attention(q, pool.k[0], pool.v[0], plan, impl="triton"), first)


def test_pools_of_more_than_two_to_the_31_elements(device, dtype):
    if device.type != "cuda":
        pytest.skip("a pool of 4 GiB is for a GPU")
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    trees = make_trees([(-1, 600, 0), (0, 37, 3)], [(1, 36), (0, 599)])
    q, k, v = make(trees, 8, 8, 128, dtype, packed=False)
    far = (1 << 31) // (16 * 8 * 128) + 5
    large = [torch.empty(far + len(k), *k.shape[1:], dtype=dtype, device=device) for _ in range(2)]
    for pool, small in zip(large, (k, v), strict=True):
        pool[far:].copy_(small)
    plan = build_plan(trees)
    moved, segs = plan.clone(), int(plan[19])
    moved[segs : segs + 4 * int(plan[6]) : 4] += far
    exact, _, low, _ = expected(q, k, v, plan, 128**-0.5, 0.0, 0, None, {})
    out, _ = run(device, q, *large, moved)
    assert_within_budget(out, exact, low, factor=3.0)


def test_defaults_are_among_what_was_compiled():
    assert {*lookup("sm_90", 128, 128, 2), *BOX_TABLE["sm_90", 128, 2]} <= set(SINGLE)
