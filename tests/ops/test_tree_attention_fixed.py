"""Attention over int16 and int8 pages: within what rounding the weights may cost, and the same bits for any plan."""

import pytest
import torch
from attention import DEEP, DEEP_ROWS, fixed_bounds, fixed_pools, fixed_query, make, make_fixed
from budget import ROUNDING
from plans import CPU_MODES, build_plan, make_trees, random_trees

from ttskernels import _dispatch, layout
from ttskernels._reference import tree_attention as reference
from ttskernels.errors import UnavailableError
from ttskernels.ops.tree_attention import tree_attention

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORMS = list(layout.FIXED)


@pytest.fixture(autouse=True)
def torch_on_one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(*args, **options):
    return tree_attention(*args, return_lse=True, impl="cpu", **options)


def exact_of(q, k, v, plan, scale, softcap, window, sinks, cache={}):  # noqa: B006 - the same at every level
    key = (*(t.contiguous().view(torch.uint8).numpy().tobytes() for t in (q, k, v, plan)), scale, softcap, window)
    if key not in cache:
        options = (plan, scale, softcap, window, sinks)
        rounded = fixed_query(q, k.dtype)
        exact = reference.tree_attention(rounded, k, v, *options)
        low, low_lse = reference.tree_attention(rounded.float(), k, v, *options)
        cache[key] = exact, (low.to(q.dtype), low_lse), fixed_bounds(rounded, k, v, *options)
    return cache[key]


def check(q, k, v, plan, scale=None, softcap=0.0, window=0, sinks=None):
    """Against float64 over q as it is rounded and the values of the same pages."""
    scale = q.shape[2] ** -0.5 if scale is None else scale
    got = run(q, k, v, plan, scale=scale, softcap=softcap, window=window, sinks=sinks)
    exact, low, bounds = exact_of(q, k, v, plan, scale, softcap, window, sinks)
    for ours, true, theirs, bound in zip(got, exact, low, bounds, strict=True):
        assert torch.equal(ours.isinf(), true.isinf()) and not ours.isnan().any()
        finite = true.isfinite()
        own, size = (theirs.double() - true)[finite].abs().max(), true[finite].abs().max()
        error = (ours.double() - true)[finite].abs()
        allowed = 2 * own + ROUNDING.get(ours.dtype, 2**-23) * size + bound[finite]
        assert (error <= allowed).all(), f"error {error.max():.3g}, {(error / allowed).max():.3g} of what is allowed"
    return got


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
def test_how_q_is_rounded(form, head_dim):
    """To half a step of at least 11 bits; the largest products fit."""
    q = torch.randn(5, 3, head_dim).bfloat16()
    most_k = layout.MOST[layout.FIXED[form]]
    step = q.double().abs().amax(-1, keepdim=True) / min(2**15 - 1, (2**31 - 1) // (most_k * head_dim))
    assert ((fixed_query(q, layout.FIXED[form]) - q).abs() <= 0.5001 * step).all()
    assert (q.double().abs().amax(-1, keepdim=True) / step * most_k * head_dim < 2**31).all()
    assert step.max() * 2047 <= q.double().abs().max() * 1.0001


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "q_heads, kv_heads, head_dim",
    [(1, 1, 64), (6, 3, 80), (9, 3, 64), (4, 1, 96), (5, 1, 128), (6, 1, 64), (14, 2, 64), (8, 1, 256), (4, 2, 192)],
)
def test_heads(isa, form, dtype, q_heads, kv_heads, head_dim):
    trees = random_trees(q_heads + head_dim)
    check(*make_fixed(trees, q_heads, kv_heads, head_dim, dtype, form), build_plan(trees))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "head_dim, v_dim, scale", [(64, 64, None), (64, 64, 2.0), (192, 128, None), (64, 80, None), (16, 16, 4.0)]
)
def test_long_nodes_and_v_dim(isa, form, head_dim, v_dim, scale):
    """With a large scale maxima move from tile to tile."""
    trees = make_trees(DEEP, DEEP_ROWS)
    check(*make_fixed(trees, 3, 1, head_dim, torch.float32, form, v_dim), build_plan(trees), scale)


@pytest.mark.parametrize("form", FORMS)
def test_many_rows(isa, form):
    """More rows than are served in place, over aligned pages and, behind a split, gathered ones."""
    for offset in (0, 5):
        nodes = [(-1, 100 - offset, 0), (0, 90, offset)]
        trees = make_trees(nodes, [(1, i) for i in range(90)])
        check(*make_fixed(trees, 7, 1, 64, torch.float32, form), build_plan(trees))


@pytest.mark.parametrize("form", FORMS)
def test_extremes_fit(isa, form):
    """Every product at its largest: sums stay within int32."""
    for head_dim in (16, 64, 128, 256):
        trees = make_trees([(-1, 64, 0)], [(0, 63), (0, 20)])
        q, k, v = make(trees, 2, 1, head_dim, torch.float32, packed=False)
        q[:], q[1] = 3.0, -3.0
        used = ~k.isnan()
        k[used], v[used] = -2.0, 5.0
        v[..., 1::2] *= -1
        out, _ = check(q, *fixed_pools(trees, k, v, form), build_plan(trees), scale=0.01)
        torch.testing.assert_close(out.abs(), torch.full_like(out, 5.0))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["deep", "random"])
def test_plan_changes_no_bit(isa, form, case):
    for seed in [0] if case == "deep" else range(4):
        trees = make_trees(DEEP, DEEP_ROWS) if case == "deep" else random_trees(seed)
        args = make_fixed(trees, 14, 2, 64, torch.bfloat16, form)
        expected = run(*args, build_plan(trees))
        assert expected[0].isfinite().all()
        for mode in CPU_MODES[1:]:
            assert_same(run(*args, build_plan(trees, mode, seed)), expected)


@pytest.mark.parametrize("form", FORMS)
def test_threads_change_no_bit(isa, form):
    trees, lib = make_trees(DEEP, DEEP_ROWS), _dispatch.library()
    args, before = make_fixed(trees, 6, 2, 64, torch.bfloat16, form), lib.ttsk_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            lib.ttsk_set_num_threads(threads)
            results.append(run(*args, build_plan(trees)))
    finally:
        lib.ttsk_set_num_threads(before)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [0, 30])
def test_prefill_equals_decode(isa, form, window):
    nodes = [(-1, 83, 3), (0, 75, 0)]
    trees = make_trees(nodes, [(1, i) for i in range(75)] + [(0, 82)])
    q, k, v = make(trees, 7, 1, 64, torch.float32, packed=False)
    together = check(q, *fixed_pools(trees, k, v, form), build_plan(trees), window=window)
    for i in [0, 1, 15, 16, 40, 63, 64, 74]:
        one = make_trees(nodes, [(1, i)])
        one.nodes = trees.nodes
        earlier = [t.clone() for t in (k, v)]
        for page, slot in trees.slots(1)[i + 1 :]:  # one by one, what comes later is not there yet
            for t in earlier:
                t[page, slot] = float("nan")
        alone = run(q[i : i + 1], *fixed_pools(trees, *earlier, form), build_plan(one, "pushed"), window=window)
        assert_same(alone, [t[i : i + 1] for t in together])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options",
    [{"window": 1}, {"window": 70}, {"softcap": 2.0}, {"sinks": True}, {"scale": 1.7}],
    ids=lambda o: next(iter(o)),
)
def test_options(isa, form, options):
    trees, options = make_trees(DEEP, DEEP_ROWS), dict(options)
    args = make_fixed(trees, 6, 2, 64, torch.float32, form)
    if "sinks" in options:
        options["sinks"] = torch.tensor([0.0, -3.0, 8.0, 1.0, 20.0, -50.0])
    expected = check(*args, build_plan(trees), **options)
    for mode in ("pushed", "prefix"):
        assert_same(run(*args, build_plan(trees, mode), **options), expected)


@pytest.mark.parametrize("form", FORMS)
def test_page_placement_changes_no_bit(isa, form):
    nodes, rows = [(-1, 150), (0, 33), (0, 5)], [(1, 32), (2, 4)]
    results = []
    for seed, offsets in [(0, (0, 0, 0)), (1, (7, 0, 1)), (2, (1, 15, 2))]:
        trees = make_trees([(*n, o) for n, o in zip(nodes, offsets, strict=True)], rows, seed=seed)
        q, k, v = make(trees, 4, 2, 80, torch.float32, packed=False)
        values = torch.randn(2, 188, 2, 80, generator=torch.Generator().manual_seed(7))
        page, slot = torch.tensor([s for n in range(3) for s in trees.slots(n)]).T
        k[page, slot], v[page, slot] = values
        results.append(run(q, *fixed_pools(trees, k, v, form), build_plan(trees)))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@pytest.mark.parametrize("form", FORMS)
def test_empty_rows(isa, form):
    trees = make_trees([(-1, 20, 0), (-1, 0, 0)], [(0, 19), (1, -1), (0, 3), (1, -1)])
    args = make_fixed(trees, 4, 2, 64, torch.bfloat16, form)
    for mode in ("separate", "grouped", "direct"):
        out, lse = run(*args, build_plan(trees, mode), sinks=torch.zeros(4))
        assert (out[[1, 3]] == 0).all() and (lse[[1, 3]] == float("-inf")).all()
        assert out[[0, 2]].isfinite().all()
    none = make_trees([(-1, 20, 0)], [])
    assert tree_attention(args[0][:0], *args[1:], build_plan(none), impl="cpu").shape == (0, 4, 64)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["q", "k", "v", "every k"])
def test_what_is_not_finite_shows_in_the_rows_that_see_it_alone(isa, form, bad, where):
    trees = make_trees([(-1, 70, 0), (0, 40, 0), (0, 3, 0)], [(0, 60), (0, 66), (1, 39), (2, 2)])
    q, k, v = make(trees, 4, 2, 64, torch.float32, packed=False)
    plan = build_plan(trees)
    clean = run(q, *fixed_pools(trees, k, v, form), plan)
    if where == "q":
        q[1, :, 7], hit = bad, [1]
    elif where == "every k":
        k[tuple(torch.tensor(trees.slots(0)).T)], hit = bad, [0, 1, 2, 3]
    else:
        page, slot = trees.slots(0)[65]
        (k if where == "k" else v)[page, slot, :, 3], hit = bad, [1, 2, 3]
    out, lse = run(q, *fixed_pools(trees, k, v, form), plan)
    kept = [r for r in range(4) if r not in hit]
    assert out[hit].isnan().all() and (where == "v" or lse[hit].isnan().all())
    assert_same((out[kept], lse[kept]), (clean[0][kept], clean[1][kept]))


def test_a_row_whose_scores_are_all_nan_is_not_empty(isa):
    trees = make_trees([(-1, 5, 0)], [(0, 4)])
    for dtype in DTYPES:
        q, k, v = make(trees, 2, 1, 64, dtype)
        out, lse = run(torch.full_like(q, float("nan")), k, v, build_plan(trees))
        assert out.isnan().all() and lse.isnan().all()


@pytest.mark.parametrize("form", FORMS)
def test_zeros_and_tiny_values(isa, form):
    trees = make_trees([(-1, 20, 0)], [(0, 19), (0, 3)])
    q, k, v = make(trees, 2, 1, 64, torch.float32, packed=False)
    for scale in (0.0, 1e-38):
        out, lse = run(q * scale, *fixed_pools(trees, k * scale, v, form), build_plan(trees))
        mean = [v[tuple(torch.tensor(trees.slots(0)[:n]).T)].mean(0) for n in (20, 4)]
        most = 8191 if form == "int16" else 32767
        worst = 20 / most + 1 / layout.MOST[layout.FIXED[form]]
        torch.testing.assert_close(out, torch.stack(mean).expand(2, 2, 64), atol=4 * worst, rtol=0)
        torch.testing.assert_close(lse, torch.tensor([[20.0], [4.0]]).log().expand(2, 2))
        out, _ = run(q, *fixed_pools(trees, k, v * scale, form), build_plan(trees))
        assert (out == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_layout_round_trip(form):
    k, v = torch.randn(3, 16, 2, 32), torch.randn(3, 16, 2, 48)
    pages = layout.from_nhd_fixed(k, v, layout.FIXED[form])
    size = layout.FIXED[form].itemsize
    assert [p.shape for p in pages] == [(3, 2, 16 * 32 + 64 // size), (3, 2, 16 * 48 + 64 // size)]
    assert [layout.dim_of(p) for p in pages] == [32, 48]
    for wide, back, packed, keys in zip((k, v), layout.to_nhd_fixed(*pages), pages, (True, False), strict=True):
        scale = layout.fixed_parts(packed, keys=keys)[1]
        assert ((back - wide).abs() <= scale[..., None] * 0.5001).all()
        assert (scale == wide.abs().amax(-1) / layout.MOST[packed.dtype]).all()
    ints = pages[0][1, 1][: 16 * 32].view(16, 16, 2)  # [dim / 2][16][2] of one page and head
    assert torch.equal(ints[3, 5], layout.fix(k[1, 5, 1], pages[0].dtype)[0][6:8])
    ints = pages[1][1, 1][: 16 * 48].view(8, 48, 2)
    assert ints[2, 7, 1] == layout.fix(v[1, 5, 1], pages[1].dtype)[0][7]


@pytest.mark.parametrize("form", FORMS)
def test_opcheck_and_out(cpu_extension, form):
    trees = random_trees(0)
    q, k, v = make_fixed(trees, 4, 2, 64, torch.float32, form, 48)
    plan, out = build_plan(trees), torch.empty(len(trees.rows), 4, 48)
    torch.library.opcheck(torch.ops.ttskernels.tree_attention.default, (q, k, v, plan, 0.1, 0.0, 0, torch.zeros(4), out))
    for impl in ("cpu", "reference"):
        assert tree_attention(q, k, v, plan, out=out, impl=impl) is out
        assert torch.equal(tree_attention(q, k, v, plan, impl=impl), out)


def test_invalid(cpu_extension):
    trees = random_trees(0)
    q, k, v = make_fixed(trees, 4, 2, 64, torch.float32, "int8")
    plan = build_plan(trees)
    ones = torch.ones(2)
    for args, options, message in [
        ((q, k, v.view(torch.int16), plan), {}, "or both int16 or int8, got torch.int8 and torch.int16"),
        ((q, k[:, 0], v[:, 0], plan), {}, r"int16 and int8 k_pages and v_pages must be 3-D \(PagePool\(form=\.\.\.\)\)"),
        ((q, k[:, :, 1:], v, plan), {}, r"k_pages and v_pages must be \(\d+, 2, 1088\) and \(\d+, 2, 1088\)"),
        ((q, k, v[:, :, 1:], plan), {}, r"k_pages and v_pages must be \(\d+, 2, 1088\) and \(\d+, 2, 1072\)"),
        ((q, k.transpose(0, 1).contiguous().transpose(0, 1), v, plan), {}, "must be contiguous; pass one layer"),
        ((q, k, v, plan), {"k_scale": ones}, "k_scale must be float32 .*, for float8 pools"),
        ((q, k, v, plan), {"impl": "triton"}, "impl 'triton'"),
    ]:
        with pytest.raises((ValueError, UnavailableError), match=message):
            tree_attention(*args, **options)
    with pytest.raises(RuntimeError, match="fixed-point pools must be contiguous"):
        torch.ops.ttskernels.tree_attention(q, k[:, :, 1:], v, plan, 0.1, 0.0, 0, None, torch.empty_like(q))
