import math

import pytest
import torch
from attention import DEEP, DEEP_ROWS, expected, make, sdpa
from budget import assert_within_budget
from plans import CPU_MODES, build_plan, make_trees, random_trees

from ttskernels import _dispatch, layout
from ttskernels._reference import tree_attention as reference
from ttskernels.ops.tree_attention import tree_attention

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def torch_on_one_thread():
    """Tiny SDPA calls gain nothing from a team."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(q, k, v, plan, scale=None, softcap=0.0, window=0, sinks=None):
    """Against float64, with PyTorch's own error as the budget."""
    scale = q.shape[2] ** -0.5 if scale is None else scale
    out, lse = tree_attention(
        q, k, v, plan, scale=scale, softcap=softcap, window=window, sinks=sinks, return_lse=True, impl="cpu"
    )
    exact, exact_lse, low, low_lse = expected(q, k, v, plan, scale, softcap, window, sinks)
    assert_within_budget(out, exact, low)
    assert_within_budget(lse, exact_lse, low_lse)
    return out, lse


@pytest.mark.parametrize("window", [0, 5])
def test_reference_against_sdpa(window):
    trees = random_trees(3)
    q, k, v = make(trees, 6, 2, 32, torch.float64, packed=False)
    plan = build_plan(trees)
    out, lse = reference.tree_attention(q, k, v, plan, 0.2, 0.0, window, None)
    torch.testing.assert_close(out, sdpa(q, k, v, plan, 0.2, window))
    ones, _ = reference.tree_attention(q, k, torch.ones_like(v), plan, 0.2, 0.0, window, None)
    torch.testing.assert_close(ones, torch.ones_like(ones))
    keys = reference.visible_kv(q, k, v, plan, window)[0][0]
    scores = torch.stack([keys[:, h // 3] @ q[0, h] * 0.2 for h in range(6)])
    torch.testing.assert_close(lse[0], scores.logsumexp(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "q_heads, kv_heads, head_dim",
    [
        (1, 1, 64),
        (6, 3, 80),
        (9, 3, 64),
        (4, 1, 96),
        (5, 1, 128),
        (6, 1, 64),
        (14, 2, 64),
        (8, 1, 256),
        (4, 2, 192),
    ],
)
def test_heads(isa, dtype, q_heads, kv_heads, head_dim):
    trees = random_trees(q_heads + head_dim)
    check(*make(trees, q_heads, kv_heads, head_dim, dtype), build_plan(trees))


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_nodes(isa, dtype):
    trees = make_trees(DEEP, DEEP_ROWS)
    check(*make(trees, 3, 1, 64, dtype), build_plan(trees))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("climb", [3.0, 12.0, 40.0, -40.0])
def test_scores_that_climb(isa, dtype, climb):
    """By `climb` powers of two in 64 tokens, so that maxima move never, late, at every tile; or all is in the first one."""
    nodes = [(-1, 700, 3), (0, 150, 0)]
    trees = make_trees(nodes, [(1, 149), (1, 3), (1, 80), (0, 699)])
    q, k, v = make(trees, 6, 2, 64, dtype)
    keys, values = layout.to_nhd(k, v)
    tokens = [at for node in range(2) for at in trees.slots(node)]
    for t, (page, slot) in enumerate(tokens):
        keys[page, slot] = 0.1 * keys[page, slot] + t * climb / 64 * math.log(2) / 8
    q = 1 + 0.1 * q
    check(q, *layout.from_nhd(keys, values), build_plan(trees))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim, v_dim", [(192, 128), (64, 80), (16, 16)])
def test_v_dim(isa, dtype, head_dim, v_dim):
    trees = random_trees(1)
    check(*make(trees, 4, 2, head_dim, dtype, v_dim=v_dim), build_plan(trees))


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["deep", "random"])
def test_plan_changes_no_bit(isa, dtype, case):
    seeds = [0] if case == "deep" else range(4)
    for seed in seeds:
        trees = make_trees(DEEP, DEEP_ROWS) if case == "deep" else random_trees(seed)
        args = make(trees, 14, 2, 64, dtype)
        expected = tree_attention(*args, build_plan(trees), return_lse=True, impl="cpu")
        assert expected[0].isfinite().all()
        for mode in CPU_MODES[1:]:
            actual = tree_attention(*args, build_plan(trees, mode, seed), return_lse=True, impl="cpu")
            assert_same(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q_heads, kv_heads", [(6, 2), (9, 3), (5, 5), (4, 1)])
def test_threads_change_no_bit(isa, dtype, q_heads, kv_heads):
    """Threads have heads of their own, or share them, and help each other."""
    trees, lib = make_trees(DEEP, DEEP_ROWS), _dispatch.library()
    args, before = make(trees, q_heads, kv_heads, 64, dtype), lib.ttsk_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 4, 7):
            lib.ttsk_set_num_threads(threads)
            out = torch.full_like(args[0], math.nan)
            results.append(tree_attention(*args, build_plan(trees), return_lse=True, impl="cpu", out=out))
    finally:
        lib.ttsk_set_num_threads(before)
    assert results[0][0].isfinite().all()
    for result in results[1:]:
        assert_same(result, results[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 30])
def test_prefill_equals_decode(isa, dtype, window):
    nodes = [(-1, 83, 3), (0, 75, 0)]
    rows = [(1, i) for i in range(75)] + [(0, 82)]
    trees = make_trees(nodes, rows)
    q, k, v = make(trees, 7, 1, 64, dtype)
    together = tree_attention(q, k, v, build_plan(trees), window=window, return_lse=True, impl="cpu")
    for i in [0, 1, 15, 16, 40, 63, 64, 74]:
        later = set(trees.slots(1)[i + 1 :])  # one by one, what comes later is not there yet
        knhd, vnhd = (t.clone() for t in layout.to_nhd(k, v))
        for page, slot in later:
            knhd[page, slot] = vnhd[page, slot] = float("nan")
        one = make_trees(nodes, [(1, i)])
        one.nodes = trees.nodes
        alone = tree_attention(
            q[i : i + 1],
            *layout.from_nhd(knhd, vnhd),
            build_plan(one, "pushed"),
            window=window,
            return_lse=True,
            impl="cpu",
        )
        assert_same(alone, [t[i : i + 1] for t in together])
    check(q, k, v, build_plan(trees), window=window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [{"window": 1}, {"window": 70}, {"softcap": 2.0}, {"sinks": True}, {"scale": 1.7}],
    ids=lambda o: next(iter(o)),
)
def test_options(isa, dtype, options):
    trees = make_trees(DEEP, DEEP_ROWS)
    args = make(trees, 6, 2, 64, dtype)
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = torch.tensor([0.0, -3.0, 8.0, 1.0, 20.0, -50.0])
    expected = check(*args, build_plan(trees), **options)
    for mode in ("pushed", "prefix"):
        assert_same(
            tree_attention(*args, build_plan(trees, mode), return_lse=True, impl="cpu", **options), expected
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_page_placement_changes_no_bit(isa, dtype):
    nodes, rows = [(-1, 150, 0), (0, 33, 0), (0, 5, 0)], [(1, 32), (2, 4)]
    results = []
    for seed, offsets in [(0, (0, 0, 0)), (1, (7, 0, 1)), (2, (1, 15, 2))]:
        trees = make_trees([(p, n, o) for (p, n, _), o in zip(nodes, offsets, strict=True)], rows, seed=seed)
        q, k, v = make(trees, 4, 2, 80, dtype, packed=False)
        values = torch.randn(2, 188, 2, 80, generator=torch.Generator().manual_seed(7)).to(dtype)
        slots = [s for n in range(3) for s in trees.slots(n)]
        page, slot = torch.tensor(slots).T
        k[page, slot], v[page, slot] = values
        results.append(
            tree_attention(q, *layout.from_nhd(k, v), build_plan(trees), return_lse=True, impl="cpu")
        )
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 16, 100])
@pytest.mark.parametrize("order", ["nhd", "hnd", "interleaved"])
def test_strided_pools(isa, dtype, page_size, order):
    trees = random_trees(5, page_size)
    q, k, v = make(trees, 6, 2, 80, dtype, packed=False)
    if order == "hnd":
        k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))
    elif order == "interleaved":  # vLLM's [pages, 2, page_size, heads, dim]
        k, v = torch.stack([k, v], dim=1).unbind(1)
    expected = check(q, k, v, build_plan(trees))
    for mode in ("pushed", "chunks"):
        assert_same(tree_attention(q, k, v, build_plan(trees, mode), return_lse=True, impl="cpu"), expected)
    if page_size == 16:  # the packed form of the same values: the same bits
        packed = layout.from_nhd(k, v)
        assert_same(tree_attention(q, *packed, build_plan(trees), return_lse=True, impl="cpu"), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_rows(isa, dtype):
    trees = make_trees([(-1, 20, 0), (-1, 0, 0)], [(0, 19), (1, -1), (0, 3), (1, -1)])
    q, k, v = make(trees, 4, 2, 64, dtype)
    sinks = torch.zeros(4)
    for mode in ("separate", "grouped", "direct"):
        out, lse = tree_attention(q, k, v, build_plan(trees, mode), sinks=sinks, return_lse=True, impl="cpu")
        assert (out[[1, 3]] == 0).all() and (lse[[1, 3]] == float("-inf")).all()
        assert out[[0, 2]].isfinite().all()
    none = make_trees([(-1, 20, 0)], [])
    assert tree_attention(q[:0], k, v, build_plan(none), impl="cpu").shape == (0, 4, 64)


def test_q_row_stride(cpu_extension):
    trees = random_trees(2)
    q, k, v = make(trees, 4, 2, 64, torch.float32)
    wide = torch.cat([q, torch.full_like(q, float("nan"))], dim=1)
    expected = tree_attention(q, k, v, build_plan(trees), impl="cpu")
    assert torch.equal(tree_attention(wide[:, :4], k, v, build_plan(trees), impl="cpu"), expected)


def test_layout_round_trip():
    for dtype in DTYPES:
        k, v = torch.randn(3, 16, 2, 32).to(dtype), torch.randn(3, 16, 2, 48).to(dtype)
        packed = layout.from_nhd(k, v)
        empty = layout.new_pages(3, 2, 32, dtype, v_dim=48)
        assert [p.shape for p in packed] == [p.shape for p in empty]
        assert_same(layout.to_nhd(*packed), (k, v))
    assert layout.new_pages(3, 2, 32, torch.bfloat16, layers=5)[1].shape == (5, 3, 2, 8, 32, 2)


def test_opcheck(cpu_extension):
    trees = random_trees(0)
    args = make(trees, 4, 2, 64, torch.float32)
    plan, out = build_plan(trees), torch.empty_like(args[0])
    torch.library.opcheck(
        torch.ops.ttskernels.tree_attention.default, (*args, plan, 0.1, 0.0, 0, torch.zeros(4), out)
    )


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_out(cpu_extension, impl):
    """`out` is written and returned, also into wider rows, whose other columns stay."""
    trees = random_trees(4)
    q, k, v = make(trees, 4, 2, 64, torch.float32, v_dim=48)
    plan = build_plan(trees)
    expected = tree_attention(q, k, v, plan, impl=impl)
    wide = torch.full((q.shape[0], 6, 48), float("nan"))
    out = wide[:, 1:5]
    result, lse = tree_attention(q, k, v, plan, out=out, return_lse=True, impl=impl)
    assert result is out and torch.equal(out, expected) and lse.isfinite().all()
    assert wide[:, 0].isnan().all() and wide[:, 5].isnan().all()
    for bad in (out[:-1], out.double(), wide[:, :4].transpose(1, 2), out.transpose(1, 2).contiguous().transpose(1, 2)):
        with pytest.raises(ValueError, match="out must be|of out must be contiguous"):
            tree_attention(q, k, v, plan, out=bad, impl=impl)
    square = make(trees, 4, 2, 64, torch.float32)
    with pytest.raises(ValueError, match="out must not share memory with q"):
        tree_attention(*square, plan, out=square[0], impl=impl)


def invalid(q, k, v, plan):
    no_magic = plan.clone()
    no_magic[0] = 0
    far = plan.clone()
    far[far[19]] = 99
    yield (q[0], k, v, plan), {}, r"q must be \[rows, q_heads, head_dim\]"
    yield (q, k.half(), v, plan), {}, "k_pages and v_pages must have q's dtype"
    yield (q, k, v[:, :, :, :, 0], plan), {}, "must both be packed"
    yield (q, k[:, :, :32], v, plan), {}, r"k_pages and v_pages must be \(\d+, 2, 64, 16, 1\)"
    yield (q[:, :3], k, v, plan), {}, "q_heads must be a multiple of kv_heads, got 3 and 2"
    yield (
        (q[:, :, :40].contiguous(), k[:, :, :40].contiguous(), v, plan),
        {},
        "multiples of 16 up to 256, got 40",
    )
    yield (
        (q, k.transpose(0, 1).contiguous().transpose(0, 1), v, plan),
        {},
        "must be contiguous; pass one layer",
    )
    yield (q, k, v, plan.long()), {}, "plan must be a Plan or its int32 buffer, got torch.int64"
    yield (q[1:], k, v, plan), {}, r"plan has \d+ rows, q has \d+"
    yield (
        (q, *(t.repeat(1, 2, 1, 1) for t in layout.to_nhd(k, v)), plan),
        {},
        "built for pages of 16 tokens, k_pages",
    )
    yield (q, k, v, plan), {"window": -1}, "softcap and window must be 0"
    yield (q, k, v, plan), {"sinks": torch.zeros(3)}, r"sinks must be float32 \[4\]"
    yield (q, k, v, plan), {"sinks": torch.zeros(1, 4)}, r"sinks must be float32 \[4\]"
    yield (q, k, v, plan), {"softcap": -1.0}, "softcap and window must be 0"
    yield (q, k, v, plan), {"k_scale": torch.ones(2)}, "for float8 pools"
    yield (q, k, v, plan), {"impl": "cuda"}, None


@pytest.mark.parametrize("case", range(16))
def test_invalid(cpu_extension, case):
    trees = random_trees(0)
    args, options, message = list(invalid(*make(trees, 4, 2, 64, torch.float32), build_plan(trees)))[case]
    with pytest.raises((ValueError, RuntimeError) if message is None else ValueError, match=message):
        tree_attention(*args, **options)


def test_invalid_plan(cpu_extension):
    trees = random_trees(0)
    args, plan = make(trees, 4, 2, 64, torch.float32), build_plan(trees)
    no_magic, far = plan.clone(), plan.clone()
    no_magic[0] = 0
    far[far[19]] = 99
    with pytest.raises(RuntimeError, match="pass the buffer that build_plan returned"):
        tree_attention(*args, no_magic, impl="cpu")
    with pytest.raises(RuntimeError, match=r"plan segment 0 reads tokens .* of page 99; the pool has"):
        tree_attention(*args, far, impl="cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_what_is_not_finite_shows_in_the_rows_that_see_it_alone(isa, dtype, window, bad, where):
    rows = [*((0, at) for at in range(58, 70)), (1, 39), (1, 2), (2, 2)]
    trees = make_trees([(-1, 70, 0), (0, 40, 0), (0, 3, 0)], rows)
    q, k, v = make(trees, 4, 2, 64, dtype, packed=False)
    for at in (61, 62):  # of a pair of tokens, each
        pools, sees = [q.clone(), k.clone(), v.clone()], [at <= (p if node == 0 else 70 + p) for node, p in rows]
        if window:
            sees = [s and (p if node == 0 else 70 + p) < at + window for s, (node, p) in zip(sees, rows, strict=True)]
        if where == "q":
            pools[0][4, :, 7], sees = bad, [row == 4 for row in range(len(rows))]
        else:
            page, slot = trees.slots(0)[at]
            pools[1 if where == "k" else 2][page, slot, :, 3] = bad
        for mode in ("separate", "direct"):
            plan = build_plan(trees, mode)
            for packed in (False, True):
                pages, clean = (layout.from_nhd(*p) if packed else p for p in (pools[1:], (k, v)))
                out = tree_attention(pools[0], *pages, plan, window=window, impl="cpu")
                expected_rows = tree_attention(q, *clean, plan, window=window, impl="cpu")
                kept = [not s for s in sees]
                assert torch.equal(out[kept], expected_rows[kept])
                assert where == "k" or not out[sees].flatten(1).isfinite().all(1).any()


def test_strides_of_size_one_and_expanded_sinks(cpu_extension):
    trees = random_trees(0)
    q, k, v = make(trees, 1, 1, 64, torch.float32)
    plan, sinks = build_plan(trees), torch.zeros(1).expand(1)
    turned = q[:, 0][None].transpose(0, 1)  # contiguous, torch says, whatever the stride of its only head
    assert turned.is_contiguous() and turned.stride(1) != 64
    assert torch.equal(tree_attention(turned, k, v, plan), tree_attention(q, k, v, plan))
    out = torch.empty(1, len(q), 64).transpose(0, 1)
    assert torch.equal(tree_attention(q, k, v, plan, out=out), tree_attention(q, k, v, plan))
    q, k, v = make(trees, 4, 2, 64, torch.float32)
    expanded = tree_attention(q, k, v, plan, sinks=sinks.expand(4))
    assert torch.equal(expanded, tree_attention(q, k, v, plan, sinks=torch.zeros(4)))


def test_a_window_beyond_every_position_is_none(cpu_extension):
    trees = random_trees(0)
    args = (*make(trees, 4, 2, 64, torch.float32), build_plan(trees))
    assert torch.equal(tree_attention(*args, window=2**32 + 1, impl="cpu"), tree_attention(*args, impl="cpu"))
