import threading
from types import SimpleNamespace

import pytest
import torch
from attention import DEEP, DEEP_ROWS, expected, make
from budget import assert_within_budget, to_float64
from plans import MODES, build_plan, make_trees, planned, random_trees

from ttskernels._reference import tree_attention as reference
from ttskernels.attention_launches import attention_launches
from ttskernels.kv import HeadShape, Machine, plan_from_parents
from ttskernels.ops.tree_attention import tree_attention

DTYPES = [torch.float32, torch.float16]
FORKED, FORKED_ROWS = [(-1, 150, 0), (0, 37, 0), (0, 64, 11), (2, 1, 0)], [(3, 0), (1, 36), (0, 149), (2, 5), (0, 0)]


def check(device, q, k, v, plan, scale=None, softcap=0.0, window=0, sinks=None):
    """The kernel against float64. Three times PyTorch's own error: scores in base 2 are rounded once more."""
    scale = q.shape[2] ** -0.5 if scale is None else scale
    buffer = getattr(plan, "buffer", plan)
    exact, exact_lse, low, low_lse = expected(q, k, v, buffer, scale, softcap, window, sinks, {})
    args = (t.to(device) for t in (q, k, v, buffer))
    sinks = None if sinks is None else sinks.to(device)
    out, lse = tree_attention(
        *args, scale=scale, softcap=softcap, window=window, sinks=sinks, return_lse=True, impl="triton"
    )
    assert_within_budget(out.cpu(), exact, low, factor=3.0)
    assert_within_budget(lse.cpu(), exact_lse, low_lse, factor=3.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "q_heads, kv_heads, head_dim, v_dim",
    [
        (1, 1, 64, 64),
        (6, 3, 80, 80),
        (4, 1, 96, 96),
        (5, 1, 128, 128),
        (14, 2, 64, 64),
        (8, 1, 256, 256),
        (6, 2, 192, 128),
        (37, 1, 64, 80),
        (12, 2, 64, 64),
        (16, 1, 64, 64),
    ],
)
def test_heads(device, dtype, q_heads, kv_heads, head_dim, v_dim):
    trees = random_trees(q_heads + head_dim)
    mode = MODES[q_heads % len(MODES)]
    check(device, *make(trees, q_heads, kv_heads, head_dim, dtype, v_dim, packed=False), build_plan(trees, mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(3))
def test_random_forests_under_every_plan(device, mode, seed):
    trees = random_trees(seed)
    check(device, *make(trees, 6, 2, 64, DTYPES[seed % 2], packed=False), build_plan(trees, mode, seed))


@pytest.mark.parametrize("dtype, mode", [(torch.float32, "chunks"), (torch.float16, "grouped"), (torch.float16, "prefix")])
def test_nodes_of_several_partials(device, dtype, mode):
    trees = make_trees(DEEP, DEEP_ROWS)
    check(device, *make(trees, 3, 1, 64, dtype, packed=False), build_plan(trees, mode))


@pytest.mark.parametrize(
    "options",
    [{"window": 1}, {"window": 70}, {"softcap": 2.0}, {"sinks": True}, {"scale": 1.7},
     {"softcap": 2.0, "window": 70, "sinks": True}],
    ids=lambda o: "-".join(f"{k}-{v}" for k, v in o.items()),
)  # fmt: skip
@pytest.mark.parametrize("mode", ["pushed", "rows"])
def test_options(device, options, mode):
    trees = make_trees(FORKED, FORKED_ROWS)
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = torch.tensor([0.0, -3.0, 8.0, 1.0, 20.0, -50.0])
    check(device, *make(trees, 6, 2, 64, torch.float32, packed=False), build_plan(trees, mode), **options)


def with_freed(trees, before, dtype):
    """q, k and v; the root's slots in front of `before` were freed, and hold NaN."""
    q, k, v = make(trees, 4, 2, 64, dtype, packed=False)
    page, slot = torch.tensor(trees.slots(0)[:before]).T
    k[page, slot] = v[page, slot] = float("nan")
    return q, k, v


def test_slots_before_the_window_are_not_read(device):
    trees = make_trees([(-1, 150, 5), (0, 9, 0)], [(0, 149), (1, 8)])
    tensors = with_freed(trees, 117, torch.float32)  # row (0, 149) sees positions 117 on: the middle of a tile
    for mode in ("separate", "pushed"):
        check(device, *tensors, build_plan(trees, mode), window=33)


@pytest.mark.parametrize("page_size", [1, 16, 100])
@pytest.mark.parametrize("order", ["nhd", "hnd", "interleaved"])
def test_strided_pools(device, page_size, order):
    trees = random_trees(5, page_size)
    q, k, v = make(trees, 4, 2, 64, torch.float16, packed=False)
    if order == "hnd":
        k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))
    elif order == "interleaved":
        k, v = torch.stack([k, v], dim=1).unbind(1)
    check(device, q, k, v, build_plan(trees, "chunks"))


@pytest.mark.parametrize("window", [0, 70])
@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_pools(device, kv_dtype, window):
    trees = make_trees(FORKED, FORKED_ROWS)
    q, k, v = make(trees, 6, 2, 64, torch.float16, packed=False, kv_dtype=kv_dtype)
    plan, scales = build_plan(trees), (torch.tensor([0.5, 2.0]), torch.tensor([1.5, 0.25]))
    wide = to_float64(q, k.float(), v.float())
    exact, exact_lse = reference.tree_attention(*wide, plan, 0.125, 0.0, window, None, *scales)
    low, low_lse = reference.tree_attention(q, k, v, plan, 0.125, 0.0, window, None, *scales)
    args = [t.to(device) for t in (q, k, v, plan)]
    k_scale, v_scale = (t.to(device) for t in scales)
    out, lse = tree_attention(*args, scale=0.125, window=window, k_scale=k_scale, v_scale=v_scale, return_lse=True, impl="triton")
    assert_within_budget(out.cpu(), exact, low)
    assert_within_budget(lse.cpu(), exact_lse, low_lse)


@pytest.mark.parametrize("mode", ["separate", "grouped", "direct"])
def test_empty_rows(device, mode):
    trees = make_trees([(-1, 20, 0), (-1, 0, 0)], [(0, 19), (1, -1), (0, 3), (1, -1)])
    q, k, v = (t.to(device) for t in make(trees, 6, 2, 64, torch.float32, packed=False))
    plan, sinks = build_plan(trees, mode).to(device), torch.zeros(6, device=device)
    out, lse = tree_attention(q, k, v, plan, sinks=sinks, return_lse=True, impl="triton")
    assert (out[[1, 3]] == 0).all() and (lse[[1, 3]] == float("-inf")).all()
    assert out[[0, 2]].isfinite().all()
    none = build_plan(make_trees([(-1, 20, 0)], [])).to(device)
    assert tree_attention(q[:0], k, v, none, impl="triton").shape == (0, 6, 64)


@pytest.mark.parametrize("queues", [0, 1, 3, 8])
@pytest.mark.parametrize("seed", range(2))
def test_the_planners_own_plans(device, seed, queues):
    """Many rows to a tile and more; every queue count, 0 for a GPU's plan with large and small items; the counters are
    clear again after each launch."""
    from ttskernels._triton.workspace import workspace

    trees = random_trees(seed + 20)
    trees.rows = [row for row in trees.rows for _ in range(9)]
    plan = planned(
        trees, HeadShape(4, 2, 64, 64, 2),
        machine=Machine(workers=queues or 5, queues=max(queues, 1), fold=not queues, tile_rows=16, block_rows=64,
                        walks=False, item_us=0.01, min_piece_us=0.01,
                        partial_bytes_per_second=1e15),  # reads once whatever can be
    )  # fmt: skip
    assert bool(attention_launches(plan.header).large) == (not queues)
    for _ in range(2):
        check(device, *make(trees, 4, 2, 64, torch.float16, packed=False), plan)
        assert not workspace(device, 0).counters.any()


def test_another_threads_launches_may_come_in_between(device, monkeypatch):
    from ttskernels._triton import tree_attention as kernels

    trees = make_trees([(-1, 50, 0), (0, 7, 0), (0, 21, 11)], [(1, 6), (2, 20)])
    q, k, v, plan = (t.to(device) for t in (*make(trees, 4, 2, 64, torch.float16, packed=False), build_plan(trees)))
    alone = [tree_attention(x, k, v, plan, impl="triton") for x in (q, -q)]
    merge, other = kernels.merge_kernel, []

    class BeforeOurMerge:
        def __getitem__(self, grid):
            monkeypatch.setattr(kernels, "merge_kernel", merge)
            thread = threading.Thread(target=lambda: other.append(tree_attention(-q, k, v, plan, impl="triton")))
            thread.start()
            thread.join()
            return merge[grid]

    monkeypatch.setattr(kernels, "merge_kernel", BeforeOurMerge())
    assert torch.equal(tree_attention(q, k, v, plan, impl="triton"), alone[0]) and torch.equal(other[0], alone[1])


def test_a_device_without_index_has_the_current_ones_workspace(monkeypatch):
    from ttskernels._triton import workspace

    made = workspace.Workspace(torch.empty(8), torch.zeros(8, dtype=torch.int32))
    cache = workspace.Cache()
    cache.made[torch.device("cuda", 1), 7] = made
    monkeypatch.setattr(workspace, "_CACHE", cache)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=7))
    assert workspace.workspace(torch.device("cuda"), 8) is workspace.workspace(torch.device("cuda:1"), 8) is made


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(device, scale):
    trees = random_trees(6)
    check(device, *make(trees, 4, 2, 64, torch.float32, packed=False), build_plan(trees), scale=scale)


def test_strided_q_and_given_out(device):
    trees = random_trees(2)
    q, k, v = (t.to(device) for t in make(trees, 4, 2, 64, torch.float32, packed=False))
    plan = build_plan(trees).to(device)
    expect = tree_attention(q, k, v, plan, impl="triton")
    wide = torch.cat([q, torch.full_like(q, float("nan"))], dim=1)
    room = torch.full((len(q), 5, 64), 7.0, device=device)
    assert tree_attention(wide[:, :4], k, v, plan, out=room[:, :4], impl="triton").data_ptr() == room.data_ptr()
    assert torch.equal(room[:, :4], expect) and (room[:, 4] == 7).all()


def test_errors(device):
    trees = random_trees(0)
    q, k, v = (t.to(device) for t in make(trees, 4, 2, 64, torch.float16))
    plan = build_plan(trees).to(device)
    with pytest.raises(ValueError, match="impl 'triton' needs 4-D k_pages and v_pages, got packed ones"):
        tree_attention(q, k, v, plan, impl="triton")
    q, k, v = (t.to(device) for t in make(trees, 4, 2, 64, torch.float16, packed=False))
    scale = torch.ones(2, device=device)
    with pytest.raises(ValueError, match=r"k_scale must be float32 \[2\], for float8 pools, got .* and torch.float16"):
        tree_attention(q, k, v, plan, k_scale=scale, impl="triton")
    with pytest.raises(ValueError, match="k_pages and v_pages must have q's dtype"):
        tree_attention(q, k.float(), v.float(), plan, impl="triton")


def test_the_cpu_has_no_float8(monkeypatch, cpu_extension):
    trees = random_trees(0)
    q, k, v = make(trees, 4, 2, 64, torch.float16, packed=False, kv_dtype=torch.float8_e5m2)
    with pytest.raises(ValueError, match="impl 'cpu' has no torch.float8_e5m2 pools"):
        tree_attention(q, k, v, build_plan(trees), impl="cpu")
    out = tree_attention(q, k, v, build_plan(trees))
    assert torch.equal(out, tree_attention(q, k, v, build_plan(trees), impl="reference"))


def in_order(trees):
    """The same forest with every node on pages that follow each other."""
    first = 0
    for node in trees.nodes:
        node.pages, first = list(range(first, first + len(node.pages))), first + len(node.pages)
    return trees


def check_boxes(device, q, k, v, plan, tile, window):
    """A launch of TMA with this tile, for plans whose partials' pages follow each other."""
    from ttskernels._triton.tiles import Tile, Tiles
    from ttskernels._triton.tree_attention import tree_attention as launch

    scale = q.shape[2] ** -0.5
    exact, exact_lse, low, low_lse = expected(q, k, v, plan, scale, 0.0, window, None, {})
    out = torch.full_like(q, float("nan"), device=device)
    lse = launch(*(t.to(device) for t in (q, k, v, plan)), plan[:32].tolist(), scale, 0.0, window, None, None, None, out,
                 Tiles(Tile(*tile), Tile(*tile)), True)  # fmt: skip
    assert_within_budget(out.cpu(), exact, low, factor=3.0)
    assert_within_budget(lse.cpu(), exact_lse, low_lse, factor=3.0)


@pytest.mark.parametrize("head_dim, tile", [(64, (64, 64, 4, 3)), (128, (16, 64, 4, 3)), (128, (32, 128, 4, 2))])
@pytest.mark.parametrize("mode", ["separate", "grouped", "prefix"])
def test_boxes_of_rows(device, mode, head_dim, tile):
    """NaN in unused slots, which the ends' boxes read too."""
    from ttskernels._triton.tree_attention import has_rows

    trees = in_order(make_trees(DEEP, DEEP_ROWS))
    q, k, v = make(trees, 4, 2, head_dim, torch.float16, packed=False)
    assert has_rows(k) and not has_rows(k.transpose(1, 2).contiguous().transpose(1, 2))
    for window in (0, 70):
        check_boxes(device, q, k, v, build_plan(trees, mode), tile, window)


@pytest.mark.parametrize("tile", [(64, 64, 4, 3), (16, 32, 2, 3, 4)])
@pytest.mark.parametrize("length, window, before", [(150, 33, 117), (20, 12, 8)])  # of many boxes, and of one
def test_boxes_that_begin_before_the_window(device, tile, length, window, before):
    trees = in_order(make_trees([(-1, length, 5), (0, 9, 0)], [(0, length - 1), (1, 8)]))
    tensors = with_freed(trees, before, torch.float16)
    for mode in ("separate", "pushed"):
        check_boxes(device, *tensors, build_plan(trees, mode), tile, window)


def test_boxes_are_taken_where_the_plan_has_no_page_break(device, monkeypatch):
    from ttskernels._triton import tree_attention as kernels

    made = []
    monkeypatch.setattr(kernels, "architecture", lambda _: "sm_90")
    monkeypatch.setattr(kernels, "pool_rows", lambda pool, n, make=kernels.pool_rows: made.append(n) or make(pool, n))
    k, v = (torch.randn(8, 16, 1, 64, dtype=torch.float16, device=device) for _ in range(2))
    q = torch.randn(1, 2, 64, dtype=torch.float16, device=device)
    for pages, breaks in (([2, 3, 4, 5], 0), ([2, 3, 5, 6], 1), ([5, 4, 3, 2], 3)):
        plan = plan_from_parents([-1], [60], [0, 4], pages, [0], [59], HeadShape(2, 1, 64, 64, 2))
        assert plan.header[24] == breaks
        made.clear()
        out = tree_attention(q, k, v, plan.to(device), impl="triton")
        assert bool(made) == (breaks == 0)
        exact = reference.tree_attention(*to_float64(q.cpu(), k.cpu(), v.cpu()), plan.buffer, 0.125, 0.0, 0, None)[0]
        assert (out.cpu() - exact).abs().max() < 2e-3
