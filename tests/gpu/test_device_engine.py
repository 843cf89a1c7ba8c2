"""The decoder and the engine on a GPU: logits, graphs under changing plans, searches, streams, strategies on the demo models."""

import threading
from contextlib import contextmanager

import pytest
import torch
from budget import assert_within_budget
from engines import Search, run_together, stop_table
from float8 import with_rounded_kv
from tiny_models import write_tiny
from trees import Tree, expected, stack, walk
from ttsearch import solve
from ttsearch.policies.local import LocalBackend

from ttskernels.engine.batcher import Engine
from ttskernels.engine.work import Sampling
from ttskernels.models import device_decoder, device_inputs, load_model

pytestmark = pytest.mark.gpu
VOCAB = 131
PROMPTS = [[(7 * i + 11 * t) % 100 + 8 for t in range(5 + 9 * i)] for i in range(4)]


@pytest.mark.parametrize("own_rows", ["0", "128"])
@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3", "mistral_window", "llama_rope3_bias"])
def test_logits_against_transformers(device, dtype, variant, own_rows, tmp_path, monkeypatch):
    """No further from float64 than twice what transformers itself is in the same dtype on the same device."""
    from transformers import AutoModelForCausalLM

    write_tiny(tmp_path, variant, **shape(device))
    monkeypatch.setenv("TTSK_GPU_LINEAR_ROWS", own_rows)

    def theirs(kind, where):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=kind, attn_implementation="eager").eval().to(where)
        return lambda ids: model(ids.to(where)).logits.float().cpu()

    seen = walk(load_model(tmp_path, dtype, "triton", device=device), VOCAB)
    exact, low = expected(theirs(torch.float64, "cpu"), seen), expected(theirs(dtype, device), seen)
    assert_within_budget(stack(seen).cpu(), exact.double(), low)


@pytest.mark.parametrize("own_rows", ["0", "128"])
@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3", "mistral_window"])
def test_logits_over_float8_pages(device, dtype, variant, own_rows, float8, tmp_path, monkeypatch):
    """As far from those over bf16 pages as rounding K and V moves logits in float64, within a quarter (PyTorch's bf16: 1.01 to
    1.09 times)."""
    from transformers import AutoModelForCausalLM

    write_tiny(tmp_path, variant, **shape(device))
    monkeypatch.setenv("TTSK_GPU_LINEAR_ROWS", own_rows)
    models = [load_model(tmp_path, dtype, "triton", device=device, kv=kv) for kv in ("float", "fp8")]
    plain, narrow = (walk(model, VOCAB) for model in models)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    exact = expected(lambda ids: hf(ids).logits, plain)
    with_rounded_kv(hf)
    rounded = expected(lambda ids: hf(ids).logits, plain)

    def off(a, b) -> float:
        return float((a.cpu().double() - b.cpu().double()).square().mean().sqrt())

    cost = off(rounded, exact)
    assert 0.75 * cost <= off(stack(narrow), stack(plain)) <= 1.25 * cost


def shape(device) -> dict:
    """Changes to the tiny models: in the interpreter they are tinier still."""
    one = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "hidden_size": 64}
    return {} if device.type == "cuda" else one


@pytest.fixture
def folders(tmp_path_factory, device):
    policy, verifier = tmp_path_factory.mktemp("policy"), tmp_path_factory.mktemp("verifier")
    write_tiny(policy, "llama", seed=1, **shape(device))
    write_tiny(verifier, "qwen2", seed=2, kind="ForTokenClassification", num_labels=2, **shape(device))
    return policy, verifier


def engine_on(device, folders, kv_bytes=1 << 26, dtype=torch.float32, kv="float") -> Engine:
    impl = "reference" if device is None else "triton"
    models = (load_model(f, dtype, impl, device="cpu" if device is None else device, kv=kv) for f in folders)
    return Engine(*models, next_state=stop_table(), kv_bytes=kv_bytes)


def sizes(device) -> dict:
    """Of a search: in the interpreter the smallest that forks and prunes."""
    return dict(width=4, keep=3, depth=4) if device.type == "cuda" else dict(width=2, keep=1, depth=2, step_tokens=4)


@pytest.mark.parametrize("pages", [4000, 70])
def test_searches_have_the_trees_of_the_host(device, folders, pages):
    """Forks, prunes, scores and, with few pages, evictions of four searches at once, in float32."""
    prompts, options = PROMPTS if device.type == "cuda" else PROMPTS[:1], sizes(device)
    host = engine_on(None, folders)
    trees = [Search(host, p, seed=5, **options).run() for p in prompts]
    page_bytes = host.policy_forest.pool.page_bytes + host.verifier_forest.pool.page_bytes
    host.shutdown()
    engine = engine_on(device, folders, pages * page_bytes)
    searches = [Search(engine, p, seed=5, **options) for p in prompts]
    for got, tree in zip(run_together(searches), trees, strict=True):
        assert {k: v[:2] for k, v in got.items()} == {k: v[:2] for k, v in tree.items()}
        assert all(got[k][2] == pytest.approx(v[2], abs=1e-4) for k, v in tree.items())
    if device.type == "cuda" and pages < 100:
        assert sum(s.session.counters.policy_recomputed for s in searches) > 0
    assert engine.budget.used_bytes == 0
    engine.shutdown()


def test_searches_over_float8_pages(device, dtype, folders, float8):
    """Scores are those of transformers with K and V rounded to float8: in PyTorch's bf16 0.014 off on average, 0.12 at most."""
    from transformers import AutoModelForTokenClassification

    prompts, options = PROMPTS if device.type == "cuda" else PROMPTS[:1], sizes(device)
    engine = engine_on(device, folders, dtype=dtype, kv="fp8")
    assert {f.pool.k.dtype for f in (engine.policy_forest, engine.verifier_forest)} == {torch.float8_e4m3fn}
    found = run_together([Search(engine, p, seed=5, **options) for p in prompts])
    hf = AutoModelForTokenClassification.from_pretrained(folders[1], dtype=torch.float64).eval()
    errors = []
    with_rounded_kv(hf)
    for prompt, tree in zip(prompts, found, strict=True):
        assert len(tree) >= options["width"]
        for key, (ids, _, score) in tree.items():
            assert all(0 <= i < VOCAB for i in ids) and len(ids) > 0
            path = prompt + [i for n in range(len(key)) for i in tree[key[: n + 1]][0]]
            with torch.no_grad():
                errors.append(abs(score - float(hf(torch.tensor([path])).logits[0, -1].softmax(0)[1])))
    assert sum(errors) / len(errors) <= 0.03 and max(errors) <= 0.25, errors
    assert engine.budget.used_bytes == 0
    engine.shutdown()


def decode(model, lengths, iterations, seed=0):
    """Tokens `[iterations, rows]` of leaves with so many ids each below one prompt."""
    rng = torch.Generator().manual_seed(seed)

    def ids(n):
        return torch.randint(8, VOCAB, (n,), generator=rng).tolist()

    tree = Tree(model, num_pages=512)
    root = tree.forest.add(None, ids(40))
    tree.run([root], out=[])
    leaves = tree.forest.fork(root, len(lengths))
    for leaf, n in zip(leaves, lengths, strict=True):
        tree.grow(leaf, ids(n))
    tree.run(leaves, out=[0])
    tree.forest.reserve(leaves, iterations + 1)
    for leaf in leaves:
        tree.forest.append(leaf, ids(1))
    plan = tree.plan([(leaf, len(leaf.ids) - 1, 1) for leaf in leaves])
    rows = len(leaves)
    tokens, states = torch.zeros(iterations, rows, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
    done = model.decode(
        torch.tensor([leaf.ids[-1] for leaf in leaves], dtype=torch.int32), plan, tree.pool, torch.arange(rows) + seed,
        torch.tensor([[1.0, 0, 1, 0]] * rows), torch.zeros(1, VOCAB, dtype=torch.int32), states, tokens, tokens.float(),
    )  # fmt: skip
    assert done == iterations
    return tokens


def test_graphs_serve_later_plans(device, folders, monkeypatch):
    """A graph is captured once for a padded size; other trees, row counts and plans replay it with their own results."""
    model, host = load_model(folders[0], torch.float32, "triton", device=device), load_model(folders[0], torch.float32)
    cases = [[3, 1, 20], [1, 2, 30, 9], [2], [5] * 4, [17, 33, 2]] if device.type == "cuda" else [[3, 1, 4]]
    for seed, lengths in enumerate(cases):
        iterations = 6 if device.type == "cuda" else 2
        assert torch.equal(decode(model, lengths, iterations, seed), decode(host, lengths, iterations, seed))
    if device.type == "cuda":
        graphs = model._decoder.queue._graphs
        assert graphs and {key[2] for key in graphs if key[1] == "decode"} == {1, 4}
        captured = set(graphs)
        before = decode(model, [8, 8, 8], 6, 99)
        assert torch.equal(before, decode(host, [8, 8, 8], 6, 99)) and {k[1:3] for k in graphs} == {k[1:3] for k in captured}


def test_buffers_that_grow_are_captured_again(device, folders, monkeypatch):
    monkeypatch.setattr(device_inputs, "START_INTS", 512)
    monkeypatch.setattr(device_decoder, "LEAST_SLOTS", 2)
    model, host = load_model(folders[0], torch.float32, "triton", device=device), load_model(folders[0], torch.float32)
    for lengths in ([1], [1] * 9, [30] * 3, [1]) if device.type == "cuda" else ([1],):
        assert torch.equal(decode(model, lengths, 2), decode(host, lengths, 2))


def test_an_iteration_asks_nothing_of_the_host(device, folders):
    """torch raises where the host would wait for the device; waiting for a report's own event is not that."""
    if device.type != "cuda":
        pytest.skip("no GPU is visible to torch")
    model = load_model(folders[0], torch.float32, "triton", device=device)
    run = model._decoder.decode

    def strict(*args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    tree_tokens = decode(model, [3, 1], 6)  # the pool's address is new: captured here if it has to be
    model._decoder.decode = strict
    assert torch.equal(decode(model, [3, 1], 6), tree_tokens)


def test_bad_logits_end_the_call(device, folders):
    model = load_model(folders[0], torch.float32, "triton", device=device)
    model._decoder.norm.fill_(float("inf"))
    with pytest.raises(ValueError, match="finite"):
        decode(model, [1, 1], 2)


@contextmanager
def held_back(model, cycles: int):
    """The verifier's forwards take at least so many cycles of the GPU."""
    run = model._decoder.forward

    def slow(*args):
        with model.queue.current():
            torch.cuda._sleep(cycles)
        return run(*args)

    model._decoder.forward = slow
    yield
    model._decoder.forward = run


def test_branches_decode_while_scores_are_computed(device, folders):
    """A forward of the verifier that takes about a second holds up no branch of the policy."""
    engine = engine_on(device, folders)
    session = engine.open(PROMPTS[2], PROMPTS[2], max_new_tokens=120)
    warm = engine.score(session, session.verifier_root, [9, 10, 11], [2]).result(300)
    steps, ended, done = [], [], threading.Event()

    def on_step(ordinal, end):
        steps.append(score.done())
        if not end.more:
            ended.append(ordinal)
            if len(ended) == 4:
                done.set()

    if device.type != "cuda":
        engine.shutdown()
        assert len(warm[1]) == 1
        pytest.skip("no GPU is visible to torch")

    def branch():
        engine.branch(session, session.root, key=1, ordinals=range(4), path_key=(), sampling=Sampling(1.0),
                      max_step_tokens=5, max_length=100, max_steps=6, on_step=on_step)  # fmt: skip

    score = warm_score = engine.score(session, session.verifier_root, [9, 10, 11], [2])  # captures every graph once
    branch()
    assert done.wait(300) and warm_score.result(300)[1] == pytest.approx(warm[1], abs=1e-5)
    steps.clear(), ended.clear(), done.clear()
    with held_back(engine.verifier_model, 2 * 10**9):
        score = engine.score(session, session.verifier_root, [9, 10, 11], [2])
        branch()
        assert done.wait(300)
        assert len(steps) >= 4 and not any(steps), steps
        assert score.result(300)[1] == pytest.approx(warm[1], abs=1e-5)
    engine.close(session)
    engine.shutdown()


@pytest.mark.parametrize("strategy", ["beam_search", "best_of_n", "dvts", "majority"])
def test_strategies_with_the_demo_models(device, strategy):
    """In float32 the search of the host: the same candidates, answer and votes. In bf16 an answer, on two runs the same."""
    small = device.type != "cuda"
    budget = dict(strategy=strategy, n=2 if small else 8, width=2 if small else 4, max_steps=1 if small else 20)
    budget |= dict(max_step_tokens=3) if small else {}
    from ttsearch.demo import policy_path, verifier_path

    def run(where, dtype, impl="auto"):
        backend = LocalBackend.load(policy_path(), verifier_path(), dtype=dtype, device=where, impl=impl, kv_bytes=1 << 26)
        try:
            return solve("3;a+4?" if small else "10;a+17;b-13;c*6;d-71?", backend=backend, **budget)
        finally:
            backend.close()

    on_device, host = run(str(device), "fp32", "triton"), run("cpu", "fp32")
    assert [c.text for c in on_device.candidates] == [c.text for c in host.candidates]
    assert on_device.answer == host.answer and on_device.cost.policy.tokens_decoded == host.cost.policy.tokens_decoded
    if not small:
        first, second = run("cuda", "bf16"), run("cuda", "bf16")
        assert first.answer is not None and first.answer == second.answer
