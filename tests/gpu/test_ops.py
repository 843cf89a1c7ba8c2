"""The ops beside attention on a GPU in bf16 and float8, each against its float64 reference."""

import pytest
import torch
from budget import assert_within_budget, to_float64

from ttskernels._reference import linear as linear_reference
from ttskernels._reference import rms_norm as norm_reference
from ttskernels._reference import rope_append as rope_reference
from ttskernels._reference import sample as sample_reference
from ttskernels._reference import step_score as score_reference
from ttskernels._reference import token_logprob as logprob_reference
from ttskernels.ops.linear import gated_linear, linear_parts
from ttskernels.ops.page_copy import page_copy
from ttskernels.ops.rms_norm import add_rms_norm, rms_norm
from ttskernels.ops.rope_append import rope_append
from ttskernels.ops.sample import sample
from ttskernels.ops.silu_mul import silu_mul
from ttskernels.ops.step_score import step_score
from ttskernels.ops.token_logprob import token_logprob

pytestmark = pytest.mark.gpu


def to(device, *args):
    return [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]


@pytest.mark.parametrize("rows, dim", [(3, 64), (65, 896), (256, 4096), (7, 8192)])
def test_rms_norm_and_silu_mul(device, dtype, rows, dim):
    x, y, weight = torch.randn(rows, dim).to(dtype), torch.randn(rows, dim).to(dtype), torch.rand(dim).to(dtype)
    wide = to_float64(x, y, weight)
    normed = rms_norm(*to(device, x, weight), 1e-6, impl="triton").cpu()
    functional = torch.nn.functional
    exact = functional.rms_norm(wide[0], (dim,), wide[2], 1e-6)
    assert_within_budget(normed, exact, functional.rms_norm(x, (dim,), weight, 1e-6))
    made = silu_mul(*to(device, x, y), impl="triton").cpu()
    assert_within_budget(made, functional.silu(wide[0]) * wide[1], functional.silu(x) * y)


@pytest.mark.parametrize("rows", [3, 16, 64, 100, 256])
@pytest.mark.parametrize("outputs, inputs", [(1152, 896), (896, 4864), (200, 1544)])
def test_linear_parts_and_gated_linear(device, dtype, rows, outputs, inputs):
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(2 * outputs, inputs).to(dtype)
    exact, low = linear_reference.linear_parts(x.double(), weight.double(), 1)[0], linear_reference.linear_parts(x, weight, 1)[0]
    x, weight = to(device, x, weight)
    if device.type == "cuda":  # what PyTorch's own product is off by there
        low = torch.mm(x, weight.T, out_dtype=torch.float32).cpu()
    made = linear_parts(x, weight, impl="triton")
    assert_within_budget(made.sum(0).cpu(), exact, low)
    assert torch.equal(linear_parts(x[:3].clone(), weight, impl="triton"), made[:, :3]) or device.type == "cpu"
    exact = torch.nn.functional.silu(exact[:, :outputs]) * exact[:, outputs:]
    low = (torch.nn.functional.silu(low[:, :outputs]) * low[:, outputs:]).to(dtype)
    assert_within_budget(gated_linear(x, weight, impl="triton").cpu(), exact, low)


@pytest.mark.parametrize("rows, dim, parts", [(3, 64, 2), (64, 896, 8), (256, 3072, 5)])
def test_add_rms_norm(device, dtype, rows, dim, parts):
    x, weight, added = torch.randn(rows, dim).to(dtype), torch.rand(dim).to(dtype), torch.randn(parts, rows, dim)
    exact_x, low_x = x.double(), x.clone()
    exact = norm_reference.add_rms_norm(added.double(), exact_x, None, weight.double(), 1e-6)
    low = norm_reference.add_rms_norm(added, low_x, None, weight, 1e-6)
    x, weight, added = to(device, x, weight, added)
    normed = add_rms_norm(added, x, weight, 1e-6, impl="triton")
    assert_within_budget(x.cpu(), exact_x, low_x)
    assert_within_budget(normed.cpu(), exact, low)


def test_launches_that_begin_early_wait_for_what_they_read(device, dtype, monkeypatch):
    """Sixty products and norms in a row, each reading what the one in front wrote, replayed as a graph over new rows, equal the
    same one at a time. Fresh memory is not filled here: no launch can begin beside a fill."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    on_gpu = device.type == "cuda"
    held, norm = torch.randn(64, 256).to(dtype).to(device), torch.ones(256, dtype=dtype, device=device)
    weight = (torch.randn(256, 256) / 16).to(dtype).to(device)

    def chain(wait):
        mine, normed = held.clone(), held
        for _ in range(60 if on_gpu else 4):
            parts = linear_parts(normed, weight, parts=2, impl="triton")
            normed = add_rms_norm(parts, mine, norm, impl="triton")
            if wait and on_gpu:
                torch.cuda.synchronize()
        return mine, normed

    chain(True)  # compiles
    replay = lambda: chain(False)  # noqa: E731
    if on_gpu:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = chain(False)
        replay = lambda: graph.replay() or captured  # noqa: E731
    for _ in range(100 if on_gpu else 2):
        held.normal_()
        expected = chain(True)
        assert all(torch.equal(a, b) for a, b in zip(replay(), expected, strict=True))


@pytest.mark.parametrize("head_dim, pairs, norm", [(128, 64, False), (64, 32, True), (96, 20, False), (256, 128, True)])
@pytest.mark.parametrize("rows", [5, 300])
def test_rope_append(device, dtype, rows, head_dim, pairs, norm):
    q, k, v = (torch.randn(rows, heads, head_dim).to(dtype) for heads in (8, 2, 2))
    inv_freq, positions = 10000.0 ** -(torch.arange(pairs) / pairs), torch.randint(0, 9000, (rows,), dtype=torch.int32)
    slots = torch.randperm(320)[:rows].int()
    slots[::7] = -1
    norms = [torch.rand(head_dim).to(dtype) + 0.5 for _ in range(2)] if norm else [None, None]
    pages = [torch.full((20, 16, 2, head_dim), float("nan"), dtype=dtype) for _ in range(2)]
    results = []
    for wide in (torch.float64, None):
        args = [t if t is None or wide is None else t.to(wide) for t in (q, k, v, *norms, *pages)]
        written = [t.clone() for t in args[5:]]
        turned = rope_reference.rope_append(*args[:3], inv_freq, 1.0, positions, slots, *args[3:5], 1e-6, *written)
        results.append((turned, *written))
    mine = to(device, *(t.clone() for t in pages))
    q_norm, k_norm = to(device, *norms)
    turned = rope_append(*to(device, q, k, v, inv_freq, positions, slots), *mine, q_norm=q_norm, k_norm=k_norm, impl="triton")
    for actual, exact, low in zip((turned, *mine), *results, strict=True):
        there = ~exact.isnan()
        assert torch.equal(actual.cpu().isnan(), ~there)
        assert_within_budget(actual.cpu()[there], exact[there], low[there], factor=3.0)


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_rope_append_to_float8(device, dtype, kv_dtype, float8):
    """Some of K is too large for either float8, or, by its factor, for one."""
    q, k, v = (torch.randn(40, h, 128).to(dtype) for h in (4, 2, 2))
    k[:3] *= 10_000
    place = torch.randperm(48)[:40].int()
    scales = torch.tensor([0.5, 2.0]), torch.tensor([0.25, 1.0])
    pages = [torch.zeros(3, 16, 2, 128, device=device).to(kv_dtype) for _ in range(2)]
    args = to(device, q, k, v, torch.zeros(64), place, place)  # no turn
    rope_append(*args, *pages, k_scale=scales[0].to(device), v_scale=scales[1].to(device), impl="triton")
    for page, values, scale in zip(pages, (k, v), scales, strict=True):
        info, got = torch.finfo(kv_dtype), page.cpu().float().flatten(0, 1)[place.long()]
        want = (values.float() / scale[:, None]).clamp(info.min, info.max)
        torch.testing.assert_close(got, want, rtol=info.eps / 2, atol=info.smallest_normal)


@pytest.mark.parametrize("n, dim, labels, inner", [(1, 896, 2, 0), (192, 4096, 2, 0), (100, 1536, 1, 512), (17, 3584, 2, 3584)])
@pytest.mark.parametrize("squash", ["softmax", "sigmoid", "none"])
def test_step_score(device, dtype, squash, n, dim, labels, inner):
    hidden, rows = torch.randn(200, dim).to(dtype), torch.randint(200, (n,), dtype=torch.int32)
    weight = (torch.randn(labels, inner or dim) / (inner or dim) ** 0.5).to(dtype)
    first = (torch.randn(inner, dim) / dim**0.5).to(dtype) if inner else None
    norm, mix = torch.rand(dim).to(dtype) + 0.5, torch.tensor([0.25, 1.0]) if labels > 1 else None
    wide = to_float64(hidden, norm, first, weight)
    exact = score_reference.step_score(wide[0], rows, wide[1], 1e-6, wide[2], None, wide[3], None, squash, mix)
    x = torch.nn.functional.rms_norm(hidden[rows.long()], (dim,), norm, 1e-6)
    x = x if first is None else (x @ first.T).relu()
    low = score_reference.step_score(x, torch.arange(n), None, 1e-6, None, None, weight, None, squash, mix)
    given = to(device, norm, first, mix)
    scores = step_score(*to(device, hidden, rows, weight), norm_weight=given[0], inner_weight=given[1], mix=given[2],
                        squash=squash, impl="triton")  # fmt: skip
    assert_within_budget(scores.cpu(), exact, low, factor=4.0)


@pytest.mark.parametrize("n, dim, vocab", [(1, 64, 1000), (16, 896, 151936), (60, 1536, 32000), (300, 896, 49152)])
def test_token_logprob(device, dtype, n, dim, vocab):
    vocab = vocab if device.type == "cuda" else 1000
    hidden, rows = torch.randn(200, dim), torch.randint(200, (n,), dtype=torch.int32)
    lm_head, ids = (3 * torch.randn(vocab, dim) / dim**0.5).to(dtype), torch.randint(vocab, (n,), dtype=torch.int32)
    norm = torch.rand(dim).to(dtype) + 0.5
    exact = logprob_reference.token_logprob(hidden.double(), rows, norm.double(), 1e-6, lm_head.double(), ids)
    x = torch.nn.functional.rms_norm(hidden[rows.long()].to(dtype), (dim,), norm, 1e-6)
    low = (x @ lm_head.T).float().log_softmax(-1).gather(1, ids.long()[:, None])[:, 0]
    ours = token_logprob(*to(device, hidden, rows, lm_head, ids), norm_weight=norm.to(device), impl="triton")
    assert_within_budget(ours.cpu(), exact, low)


@pytest.mark.parametrize("params", [(0.0, 0, 1, 0), (1.0, 0, 1, 0), (0.7, 40, 0.9, 0.01)], ids=str)
def test_sample(device, params):
    vocab = 151936 if device.type == "cuda" else 999
    logits, rows = torch.randn(32, vocab) * 4, torch.arange(32, dtype=torch.int32)
    keys, positions = torch.randint(-(2**62), 2**62, (32,)), torch.randint(0, 9999, (32,), dtype=torch.int32)
    settings = torch.tensor([params] * 32, dtype=torch.float32)
    tokens, logprobs = sample(*to(device, logits, rows, keys, positions, settings), impl="triton")
    expected, expected_logprobs = sample(logits, rows, keys, positions, settings, impl="reference")
    sure = torch.ones(32, dtype=torch.bool)
    if params[0] > 0:  # a draw within 1e-6 of a border of the cumulative distribution may go either way
        cdf = sample_reference.kept_probabilities(logits, settings).cumsum(-1)
        sure = ((cdf - sample_reference.uniform(keys, positions)[:, None]).abs() > 1e-6).all(-1)
    assert sure.sum() >= 8 and torch.equal(tokens.cpu()[sure], expected[sure])
    torch.testing.assert_close(logprobs.cpu()[sure], expected_logprobs[sure], rtol=2e-5, atol=2e-5)


def test_page_copy(device, dtype):
    pools = [torch.randn(4, 40, 16, 2, d).to(dtype) for d in (128, 96)]
    pairs = torch.tensor([(i, 20 + i, (i * 5) % 17) for i in range(20)], dtype=torch.int32)
    want = [p.clone() for p in pools]
    page_copy(*want, pairs, impl="reference")
    mine = to(device, *pools)
    page_copy(*mine, pairs.to(device), impl="triton")
    assert all(torch.equal(a.cpu(), b) for a, b in zip(mine, want, strict=True))
