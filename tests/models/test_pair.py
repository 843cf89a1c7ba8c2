"""Two models over one pool: each as if it were alone; log-ratios against plain transformers; what does not fit."""

import pytest
import torch
from tiny_models import write_tiny

from ttskernels.engine.batcher import Engine
from ttskernels.kv.forest import Forest
from ttskernels.kv.plan import build_plan
from ttskernels.models import load_model
from ttskernels.models.pair import PairModel, load_pair

IDS = [(7 * i) % 120 + 3 for i in range(37)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    models = [write_tiny(folder, "llama", seed=i) for i, folder in enumerate(made)]
    return made, models


def hidden_of(model, rows):
    forest = Forest(model.new_pool(8))
    node = forest.add(None, IDS)
    forest.reserve([node], 0)
    plan = build_plan(forest, [(node, 0, len(IDS))], model.heads)
    return model.forward(torch.tensor(IDS, dtype=torch.int32), plan, forest.pool, torch.tensor(rows, dtype=torch.int32), "hidden")


@pytest.mark.parametrize("dtype, kv", [(torch.float32, "float"), (torch.bfloat16, "float"), (torch.bfloat16, "int8")])
def test_each_model_runs_as_if_alone(folders, dtype, kv, cpu_extension):
    (first, second), _ = folders
    pair = load_pair(first, second, dtype, kv=kv)
    alone = [hidden_of(load_model(folder, dtype, kv=kv), [0, 5, 36]) for folder in (first, second)]
    assert torch.equal(hidden_of(pair, [0, 5, 36]), torch.cat(alone, 1))
    assert pair.kv_bytes_per_token == 2 * load_model(first, dtype, kv=kv).kv_bytes_per_token
    assert pair.new_pool(3).page_bytes == 16 * pair.kv_bytes_per_token
    assert pair.flops(8, 3) == 2 * load_model(first, dtype).config.flops(8, 3, "hidden")


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_log_ratios_equal_plain_transformers(folders, impl):
    (first, second), models = folders
    pair = load_pair(first, second, torch.float32, impl)
    got = pair.log_ratio(
        hidden_of(pair, range(len(IDS) - 1)), torch.arange(36, dtype=torch.int32), torch.tensor(IDS[1:], dtype=torch.int32)
    )
    with torch.inference_mode():
        logps = [m(torch.tensor([IDS])).logits[0, :-1].double().log_softmax(-1) for m in models]
    expected = [float(p[i, t] - q[i, t]) for p, q in [logps] for i, t in enumerate(IDS[1:])]
    torch.testing.assert_close(got, torch.tensor(expected), atol=2e-5, rtol=2e-5)


def test_a_read_above_the_new_tokens_costs_a_row_and_no_slot(folders, cpu_extension):
    """The last token in front of the new ones is a query row again, whether it is cached, new, or read by two jobs."""
    (first, second), _ = folders
    engine = Engine(None, load_pair(first, second, torch.float32), kv_bytes=1 << 24)
    session = engine.open(None, IDS[:20])
    root, below = session.verifier_root, IDS[20:]
    node, ratios = engine.score(session, root, below, range(-1, 16), targets=below).result(60)
    counters = session.counters
    assert (counters.verifier_prefilled, counters.verifier_recomputed) == (37, 0), "the root's last token was a row anyway"
    flops = counters.verifier_flops
    again = [engine.score(session, root, ids, range(-1, 16), targets=ids) for ids in (below, [*below[:-1], 4])]
    (one, same), (other, differs) = (job.result(60) for job in again)
    assert same == ratios and differs[:-1] == ratios[:-1] != differs
    assert (counters.verifier_prefilled, counters.verifier_recomputed) == (37 + 2 * 17, 1), "one row for both jobs"
    assert flops < counters.verifier_flops < 3 * flops
    engine.verifier_forest.check_integrity()
    engine.release(session, verifier=[node, one, other])
    engine.close(session)
    assert not engine.verifier_forest._live and engine.budget.used_bytes == 0
    engine.shutdown()


def test_what_does_not_fit(folders, tmp_path):
    (first, second), _ = folders
    for field, variant, changes in (
        ("vocab", "llama", {"vocab_size": 140}),
        ("layers", "llama", {"num_hidden_layers": 1}),
        ("q_heads", "llama", {"num_attention_heads": 2}),
        ("head_dim", "mistral_full", {}),
    ):
        write_tiny(tmp_path / field, variant, **changes)
        with pytest.raises(ValueError, match=f"must have the same vocab, .*; {field} is .* in the first and .* in the second"):
            load_pair(first, tmp_path / field, torch.float32)
    write_tiny(tmp_path / "classifier", "llama", kind="ForTokenClassification", num_labels=2)
    with pytest.raises(ValueError, match="has a score head; an implicit PRM is made of two plain language models"):
        load_pair(first, tmp_path / "classifier", torch.float32)
    with pytest.raises(ValueError, match="second must be a language model with its vocabulary head"):
        PairModel(load_model(first, torch.float32), load_model(tmp_path / "classifier", torch.float32))
    forms = (load_model(folder, torch.float32, kv=kv) for folder, kv in ((first, "int8"), (second, "float")))
    with pytest.raises(ValueError, match="kv_form is int8 in the first and float in the second"):
        PairModel(*forms)
    with pytest.raises(ValueError, match="impl must be one of"):
        load_pair(first, second, torch.float32, "magic")


def test_what_an_engine_cannot_read(folders, tmp_path):
    (first, second), _ = folders
    engine = Engine(None, load_pair(first, second, torch.float32), kv_bytes=1 << 24)
    session = engine.open(None, IDS[:5])
    score = lambda **given: engine.score(session, session.verifier_root, [4, 5], **given).result(60)  # noqa: E731
    with pytest.raises(ValueError, match="targets must be the token behind each of 1 reads, got None"):
        score(reads=[0])
    with pytest.raises(ValueError, match=r"reads must be indices into ids \(-1 .. 1\), got \[0, -1\]"):
        score(reads=[0, -1], targets=[4, 4])
    with pytest.raises(ValueError, match="reads must not begin with -1 where keep is 0"):
        score(reads=[-1], targets=[4], keep=0)
    with pytest.raises(ValueError, match="targets must hold ids in 0 .. 130, got 131"):
        score(reads=[0], targets=[131])
    engine.shutdown()
    write_tiny(tmp_path, "llama", kind="ForTokenClassification", num_labels=2)
    engine = Engine(None, load_model(tmp_path, torch.float32), kv_bytes=1 << 24)
    session = engine.open(None, IDS[:5])
    with pytest.raises(ValueError, match="targets must be None for a verifier with a score head"):
        score(reads=[0], targets=[1])
    engine.shutdown()
