"""Counted operations are those of the matrix products that ran: every call of the readable decoder's is added up."""

import queue

import pytest
import torch
from engines import make_engine
from tiny_models import write_tiny

from ttskernels.engine.batcher import Engine
from ttskernels.engine.keys import root_key
from ttskernels.engine.work import Sampling
from ttskernels.models import decoder, load_model
from ttskernels.models.pair import load_pair

PROMPT = [3, 9, 11, 24, 90, 17, 33, 2, 8, 120, 44, 61, 70, 15, 19, 77, 101, 6, 52, 40]


@pytest.fixture
def ran(monkeypatch):
    """A list that gets the operations of every linear and every attention call."""
    counted = []
    linear, attention = decoder.linear, decoder.tree_attention

    def counting_linear(x, packed, bias=None):
        counted.append(2 * x.shape[0] * packed.in_features * packed.out_features)
        return linear(x, packed, bias)

    def counting_attention(q, k, v, plan, **options):
        assert q.shape[0] == plan.num_rows and not options["window"]
        counted.append(4 * q.shape[1] * q.shape[2] * int((plan.row_pos + 1).sum()))
        return attention(q, k, v, plan, **options)

    monkeypatch.setattr(decoder, "linear", counting_linear)
    monkeypatch.setattr(decoder, "tree_attention", counting_attention)
    return counted


def score_all(engine):
    """Jobs with one read, several, and the same tokens twice behind different parents."""
    session = engine.open(None, PROMPT)
    reads = [0]
    jobs = [(range(30, 47), [16]), (range(50, 60), [2, 5, 9]), (range(30, 47), [16])]
    futures = [engine.score(session, session.verifier_root, list(ids), at) for ids, at in jobs]
    nodes = [future.result(60)[0] for future in futures]
    engine.score(session, nodes[1], [9, 8, 7], reads, keep=None).result(60)
    return session.counters, sum(len(at) for _, at in jobs) + len(reads)


def test_a_verifiers_last_layer_counts_for_reads_alone(tmp_path, ran):
    write_tiny(tmp_path, "qwen2", kind="ForTokenClassification", num_labels=2)
    model = load_model(tmp_path, torch.float32, "reference")
    engine = Engine(None, model, kv_bytes=1 << 26)
    counters, reads = score_all(engine)
    engine.shutdown()
    head = 2 * model.head.weight.numel() * reads
    assert counters.verifier_flops == sum(ran) + head
    rows = counters.verifier_prefilled
    assert rows == 20 + 17 + 10 + 17 + 3 and reads == 6
    assert counters.verifier_flops < 0.75 * rows * model.flops(20), "of two layers one runs for reads alone"


def test_two_models_count_both_and_their_vocabulary_heads(tmp_path, ran):
    for i in range(2):
        write_tiny(tmp_path / str(i), "qwen2", seed=i)
    engine = Engine(None, load_pair(tmp_path / "0", tmp_path / "1", torch.float32, "reference"), kv_bytes=1 << 26)
    session = engine.open(None, PROMPT)
    engine.score(session, session.verifier_root, PROMPT, range(-1, 19), targets=PROMPT).result(60)
    head = 2 * 2 * 131 * engine.verifier_model.config.hidden * 20
    assert session.counters.verifier_flops == sum(ran) + head
    engine.shutdown()


def test_a_policys_last_layer_and_head_count_for_sampled_rows_alone(tmp_path, ran):
    """Two problems, branches over several steps: prefill, decode and the tokens that a fork left to be computed."""
    write_tiny(tmp_path, "llama", seed=1)
    engine = make_engine(tmp_path, impl="reference")
    sessions, ends = [], queue.SimpleQueue()
    for prompt in (PROMPT, PROMPT[:7]):
        session = engine.open(prompt, max_new_tokens=60)
        sessions.append(session)
        engine.branch(
            session, session.root, key=root_key(0, str(prompt)), ordinals=range(3), path_key=(), sampling=Sampling(1.0),
            max_step_tokens=9, max_length=len(prompt) + 30, max_steps=4, on_step=lambda o, end: ends.put(end),
        )  # fmt: skip
    running = 6
    while running:
        running -= not ends.get(timeout=60).more
    engine.shutdown()
    assert all(session.counters.policy_decoded >= 12 for session in sessions)
    assert sum(session.counters.policy_flops for session in sessions) == sum(ran)
