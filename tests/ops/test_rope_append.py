import pytest
import torch
from budget import assert_within_budget, to_float64

from ttskernels import _dispatch, layout
from ttskernels._reference import rope_append as reference
from ttskernels.ops.rope_append import rope_append

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(
    rows, q_heads, kv_heads, head_dim, dtype, in_dtype=None, v_dim=None, pairs=None, norm=False, packed=True
):
    """Arguments of the op; slots are scattered over pages of NaN, every fifth row writes nothing."""
    v_dim, in_dtype, pages = v_dim or head_dim, in_dtype or dtype, rows // 8 + 2
    pairs = head_dim // 2 if pairs is None else pairs
    q, k = (torch.randn(rows, h, head_dim).to(in_dtype) for h in (q_heads, kv_heads))
    v = torch.randn(rows, kv_heads, v_dim).to(in_dtype)
    inv_freq = 10000.0 ** -(torch.arange(pairs) / max(pairs, 1))
    positions = torch.randint(0, 5000, (rows,), dtype=torch.int32)
    slots = torch.randperm(pages * 16)[:rows].int()
    slots[4::5] = -1
    norms = [torch.rand(head_dim).to(dtype) + 0.5 for _ in range(2)] if norm else [None, None]
    k_pages = torch.full((pages, 16, kv_heads, head_dim), float("nan"), dtype=dtype)
    v_pages = torch.full((pages, 16, kv_heads, v_dim), float("nan"), dtype=dtype)
    if packed:
        k_pages, v_pages = layout.from_nhd(k_pages, v_pages)
    return q, k, v, inv_freq, 1.25, positions, slots, *norms, 1e-6, k_pages, v_pages


def run(op, args):
    """Result and pages (token-major) of the op on copies of the pages."""
    *args, k_pages, v_pages = args
    k_pages, v_pages = k_pages.clone(), v_pages.clone()
    q = op(*args, k_pages, v_pages)
    return q, *(layout.to_nhd(k_pages, v_pages) if k_pages.ndim == 5 else (k_pages, v_pages))


def check(args, op=torch.ops.ttskernels.rope_append):
    exact = run(reference.rope_append, to_nhd_float64(args))
    low = run(reference.rope_append, args)
    for actual, e, a in zip(run(op, args), exact, low, strict=True):
        written = ~e.isnan()
        assert torch.equal(actual.isnan(), e.isnan())
        assert_within_budget(actual[written], e[written], a[written])


def to_nhd_float64(args):
    args = list(args)
    if args[-1].ndim == 5:
        args[-2:] = layout.to_nhd(*args[-2:])
    inv_freq = args[3]
    args = to_float64(*args)
    args[3] = inv_freq
    return args


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("from_float32", [False, True])
@pytest.mark.parametrize(
    "rows, q_heads, kv_heads, head_dim, options",
    [
        (0, 2, 1, 64, {}),
        (1, 9, 3, 64, {}),
        (17, 4, 2, 80, {"norm": True}),
        (23, 7, 1, 128, {"pairs": 16}),
        (6, 2, 2, 96, {"pairs": 20, "norm": True, "v_dim": 64}),
        (300, 4, 2, 64, {}),
    ],
)
def test_rope_append(isa, dtype, from_float32, rows, q_heads, kv_heads, head_dim, options):
    in_dtype = torch.float32 if from_float32 else dtype
    check(make(rows, q_heads, kv_heads, head_dim, dtype, in_dtype, **options))


FORMS = list(layout.FIXED)


def poisoned(args, form):
    """The same call with fixed-point pages whose bytes are 0xff: integers -1, scales NaN."""
    *args, k_pages, v_pages = args
    kept, pages = layout.FIXED[form], k_pages.shape[0]
    made = [
        torch.full((pages, x.shape[1], layout.fixed_run(x.shape[2], kept)), -1, dtype=kept) for x in (args[1], args[2])
    ]
    return (*args, *made)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows, kv_heads, head_dim, options",
    [
        (0, 1, 64, {}),
        (1, 3, 64, {}),
        (17, 2, 80, {"norm": True}),
        (23, 1, 128, {"pairs": 16}),
        (6, 2, 96, {"pairs": 20, "norm": True, "v_dim": 40}),
        (300, 2, 64, {}),
    ],
)
def test_fixed_point_pages(isa, form, dtype, rows, kv_heads, head_dim, options):
    """Within half a step of the exact values (and what float32 arithmetic itself costs); other slots keep every byte."""
    exact_args = make(rows, 2 * kv_heads, kv_heads, head_dim, torch.float32, dtype, **options)
    norms = [n if n is None else n.to(dtype) for n in exact_args[7:9]]
    exact_args = (*exact_args[:7], *norms, *exact_args[9:])
    args = poisoned(exact_args, form)
    q = torch.ops.ttskernels.rope_append(*args)
    wide = tuple(t if t is None else t.to(dtype).float() for t in exact_args[:3]), exact_args[3:]
    exact = run(reference.rope_append, to_nhd_float64((*wide[0], *wide[1])))
    low = run(reference.rope_append, (*wide[0], *wide[1]))
    assert_within_budget(q, exact[0], low[0].to(dtype))
    same, other = poisoned(exact_args, form), layout.MOST[layout.FIXED[form]]
    reference.rope_append(*same)
    for i, keys in ((0, True), (1, False)):
        true, own = exact[1 + i], low[1 + i]
        written = ~true.isnan().any(-1)
        values, scales = layout.fixed_parts(args[-2:][i], keys=keys)
        got = layout.to_nhd_fixed(*args[-2:], torch.float64)[i]
        untouched = (values.flatten(3) if keys else values.flatten(1, 2))[~written]
        assert torch.equal(scales.isnan(), ~written) and untouched.eq(-1).all()
        if not written.any():
            continue
        worst = (own.double() - true)[written].abs().max()
        step = true.abs().amax(-1, keepdim=True) / other
        error = (got - true).abs()[written]
        assert (error <= (0.5 + 2**-10) * step[written] + 2 * worst + 1e-12).all()
        theirs = layout.fixed_parts(same[-2:][i], keys=keys)
        assert (values[values != -1].int() - theirs[0][values != -1].int()).abs().max() <= 1
        torch.testing.assert_close(scales, theirs[1], equal_nan=True, rtol=1e-5, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_fixed_point_of_what_is_not_a_number_or_nothing(isa, form):
    args = make(8, 2, 1, 64, torch.float32)
    args[6][:] = torch.arange(8, dtype=torch.int32)
    for x in args[1:3]:
        x[0, 0, 5], x[1, 0, 6], x[2], x[3] = float("nan"), float("-inf"), 0.0, 1e-38
    pools = poisoned(args, form)
    torch.ops.ttskernels.rope_append(*pools)
    for pages, keys in ((pools[-2], True), (pools[-1], False)):
        values, scales = layout.fixed_parts(pages, keys=keys)
        values = (values.flatten(3) if keys else values.flatten(1, 2))[0, :4]
        assert (values == 0).all() and scales[0, :2].isnan().all() and (scales[0, 2:4] == 0).all()
        assert (scales[0, 4:8] > 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_fixed_point_op(cpu_extension, form):
    """Rows of 1 and 2 threads, the public op at both implementations, and what it refuses."""
    args = poisoned(make(300, 4, 2, 64, torch.bfloat16, norm=True), form)
    lib = _dispatch.library()
    before, results = lib.ttsk_num_threads(), []
    try:
        for threads in (1, 2):
            lib.ttsk_set_num_threads(threads)
            pages = [t.clone() for t in args[-2:]]
            results.append((torch.ops.ttskernels.rope_append(*args[:-2], *pages), *pages))
    finally:
        lib.ttsk_set_num_threads(before)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    names = ("q_norm", "k_norm", "eps")
    options = dict(zip(names, args[7:10], strict=True)) | {"rope_scale": args[4]}
    for impl in ("cpu", "reference"):
        q = rope_append(*args[:4], *args[5:7], *(t.clone() for t in args[-2:]), impl=impl, **options)
        assert q.dtype == torch.bfloat16
        torch.testing.assert_close(q, results[0][0])
    small = poisoned(make(4, 4, 2, 64, torch.bfloat16), form)
    torch.library.opcheck(torch.ops.ttskernels.rope_append.default, (*small[:-2], *(torch.zeros_like(t) for t in small[-2:])))
    with pytest.raises(ValueError, match=r"the pages must be \('pages', 2, \d+\) and \('pages', 2, \d+\), got"):
        rope_append(*args[:4], *args[5:7], args[-2][:, :, 1:], args[-1])
    with pytest.raises(ValueError, match=r"q_norm must be torch.bfloat16 \[64\]"):
        rope_append(*args[:4], *args[5:7], *args[-2:], q_norm=torch.ones(64))
    with pytest.raises(RuntimeError, match=r"slots\[0\] is 9999"):
        rope_append(*small[:4], small[5], torch.tensor([9999, 0, 1, 2], dtype=torch.int32), *small[-2:], impl="cpu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_pages(isa, dtype):
    args = make(11, 4, 2, 64, dtype, packed=False)
    check(args)
    hnd = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in args[-2:]]
    check((*args[:-2], *hnd))


def test_rows_of_one_projection(cpu_extension):
    q, k, v, *rest = make(5, 4, 2, 64, torch.bfloat16, torch.float32)
    fused = torch.cat([q, k, v], dim=1)
    sliced = fused.split([4, 2, 2], dim=1)
    expected = run(torch.ops.ttskernels.rope_append, (q, k, v, *rest))
    for a, b in zip(run(torch.ops.ttskernels.rope_append, (*sliced, *rest)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows, heads", [([], 2), ([], 0), ([1, 3], 0), ([0, 2], 1)])
def test_no_rows_no_heads_one_head(impl, rows, heads):
    """Strides of empty tensors and of a single head mean nothing; without q heads k and v are written all the same."""
    args = list(make(5, 2, 1, 64, torch.bfloat16))
    args[0] = torch.randn(5, 4, 64).bfloat16()[:, ::2][:, :heads][rows]
    args[1:3], args[5:7] = (t[rows] for t in args[1:3]), (t[rows] for t in args[5:7])
    names = ("q_norm", "k_norm", "eps")
    options = dict(zip(names, args[7:10], strict=True)) | {"rope_scale": args[4]}

    def op(which):
        k_pages, v_pages = args[10].clone(), args[11].clone()
        q = rope_append(*args[:4], *args[5:7], k_pages, v_pages, impl=which, **options)
        return q, *layout.to_nhd(k_pages, v_pages)

    for ours, expected in zip(op(impl), op("reference"), strict=True):
        torch.testing.assert_close(ours, expected, equal_nan=True)


def test_reference_against_transformers():
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    args = make(7, 4, 2, 64, torch.float32)
    q, k, inv_freq, scale, positions = args[0], args[1], args[3], args[4], args[5]
    angles = (positions[:, None].float() * inv_freq).repeat(1, 2)
    cos, sin = angles.cos() * scale, angles.sin() * scale
    expected, _ = apply_rotary_pos_emb(q[None], k[None], cos[None], sin[None], unsqueeze_dim=2)
    torch.testing.assert_close(run(reference.rope_append, args)[0], expected[0])


def test_threads_change_no_bit(cpu_extension):
    args, lib = make(300, 4, 2, 64, torch.bfloat16, norm=True), _dispatch.library()
    before, results = lib.ttsk_num_threads(), []
    try:
        for threads in (1, 2):
            lib.ttsk_set_num_threads(threads)
            results.append(run(torch.ops.ttskernels.rope_append, args))
    finally:
        lib.ttsk_set_num_threads(before)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_public_op(cpu_extension, impl):
    q, k, v, inv_freq, scale, positions, slots, *_, k_pages, v_pages = make(9, 4, 2, 64, torch.bfloat16)
    expected = run(
        reference.rope_append, (q, k, v, inv_freq, scale, positions, slots, None, None, 0.0, k_pages, v_pages)
    )
    out = rope_append(q, k, v, inv_freq, positions, slots, k_pages, v_pages, rope_scale=scale, impl=impl)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(layout.to_nhd(k_pages, v_pages)[1], expected[2], equal_nan=True)


def test_opcheck(cpu_extension):
    args = make(4, 4, 2, 64, torch.bfloat16, torch.float32, norm=True)
    pages = [torch.zeros_like(t) for t in args[-2:]]
    torch.library.opcheck(torch.ops.ttskernels.rope_append.default, (*args[:-2], *pages))


def test_invalid(cpu_extension):
    q, k, v, inv_freq, _, positions, slots, *_, k_pages, v_pages = make(4, 4, 2, 64, torch.bfloat16)
    good = {
        "q": q,
        "k": k,
        "v": v,
        "inv_freq": inv_freq,
        "positions": positions,
        "slots": slots,
        "k_pages": k_pages,
        "v_pages": v_pages,
    }
    for change, message in [
        ({"k": k[:3]}, "q, k and v must be"),
        ({"q": q.half()}, "must be float32 or the pages' dtype torch.bfloat16, got torch.float16"),
        ({"v_pages": v_pages[:, :, :4]}, "the pages must be"),
        (
            {"k_pages": k_pages.transpose(0, 1).contiguous().transpose(0, 1)},
            "must be contiguous; pass one layer",
        ),
        ({"inv_freq": inv_freq.repeat(2)}, "at most head_dim / 2 = 32 elements"),
        ({"positions": positions.long()}, r"positions must be int32 \[4\], got torch.int64"),
        ({"slots": slots[:2]}, r"slots must be int32 \[4\]"),
        ({"q_norm": torch.ones(8)}, r"q_norm must be torch.bfloat16 \[64\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            rope_append(**(good | change))
    with pytest.raises(RuntimeError, match=r"slots\[0\] is 999, need -1 or less than 32"):
        rope_append(**(good | {"slots": torch.tensor([999, 0, 1, 2], dtype=torch.int32)}), impl="cpu")


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_parts_and_bias_are_added_first(cpu_extension, impl):
    parts, bias = torch.randn(3, 4, 8 * 32), torch.randn(8 * 32)
    slots, place, inv_freq = torch.arange(4).int(), torch.tensor([0, 7, 300, 2]).int(), torch.rand(16)
    results = []
    for qkv, b in ((parts, bias), (parts.sum(0) + bias, None)):
        q, k, v = (t.unflatten(-1, (-1, 32)) for t in qkv.split([4 * 32, 2 * 32, 2 * 32], -1))
        pages = [torch.zeros(1, 16, 2, 32) for _ in range(2)]
        if impl == "cpu":
            pages = [t.contiguous() for t in layout.from_nhd(*pages)]
        results.append([rope_append(q, k, v, inv_freq, place, slots, *pages, bias=b, impl=impl), *pages])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_sum_with_a_bias_is_rounded_once(cpu_extension, impl, dtype):
    q, k, v = (torch.randn(7, heads, 32).to(dtype) for heads in (4, 2, 2))
    bias, slots = torch.randn(8 * 32).to(dtype) * 8, torch.arange(7).int()
    place, inv_freq = torch.randint(0, 999, (7,)).int(), torch.rand(16)
    results = []
    for wide, b in ((False, bias), (True, None)):
        if wide:  # in float32
            parts = (t.float() + b.float().view(t.shape[1:]) for t, b in zip((q, k, v), bias.split([128, 64, 64]), strict=True))
            q, k, v = parts
        pages = [torch.zeros(1, 16, 2, 32, dtype=dtype) for _ in range(2)]
        if impl == "cpu":
            pages = [t.contiguous() for t in layout.from_nhd(*pages)]
        results.append([rope_append(q, k, v, inv_freq, place, slots, *pages, bias=b, impl=impl), *pages])
    for got, expected in zip(*results, strict=True):
        assert got.dtype == dtype and torch.equal(got, expected)


def test_invalid_parts():
    q, k, pages = torch.randn(2, 4, 4, 32), torch.randn(2, 4, 2, 32), torch.zeros(1, 16, 2, 32)
    args = torch.rand(16), torch.zeros(4).int(), torch.arange(4).int(), pages, pages.clone()
    with pytest.raises(ValueError, match="same number of parts"):
        rope_append(q, k[:1], k, *args)
    with pytest.raises(ValueError, match="must be float32, got torch.float16"):
        rope_append(q.half(), k.half(), k.half(), *args)
    with pytest.raises(ValueError, match=r"bias must be floating \[256\]"):
        rope_append(q, k, k, *args, bias=torch.zeros(128))
