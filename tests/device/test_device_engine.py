"""The same engine over the device decoder: the trees, scores and counters of the host's, also under memory pressure."""

import threading

import pytest
import torch
from engines import Search, make_engine, run_together, stop_table
from tiny_models import SMALL, write_tiny

from ttskernels.engine.batcher import Engine
from ttskernels.engine.work import Sampling
from ttskernels.models import load_model
from ttskernels.models.device_queue import Fetch
from ttskernels.models.pair import load_pair

PROMPT = [3, 9, 11, 24, 90, 17, 33, 2, 8, 120, 44, 61, 70, 15, 19, 77, 101, 6, 52, 40]


def device_engine(folders, device, **options) -> Engine:
    policy, verifier = (load_model(folder, torch.float32, "triton", device=device) for folder in folders)
    return Engine(policy, verifier, next_state=stop_table(), **options)


def assert_same_tree(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for key, (ids, reason, score) in expected.items():
        assert got[key][:2] == (ids, reason), key
        assert got[key][2] == pytest.approx(score, abs=1e-5), key


@pytest.mark.slow
def test_a_search_has_the_tree_of_the_host(device, folders):
    searches = dict(seed=3, width=3, keep=2, depth=2, step_tokens=14)
    host = make_engine(*folders, impl="reference")
    expected = Search(host, PROMPT, **searches)
    tree = expected.run()
    host.shutdown()
    assert {end[1] for end in tree.values()} >= {"step", "length"} or len(tree) > 6
    engine = device_engine(folders, device, kv_bytes=1 << 24)
    search = Search(engine, PROMPT, **searches)
    assert_same_tree(search.run(), tree)
    mine, theirs = search.session.counters, expected.session.counters
    for name in ("policy_prefilled", "policy_decoded", "policy_reused", "verifier_prefilled", "verifier_reused"):
        assert getattr(mine, name) == getattr(theirs, name), name
    assert mine.policy_flops == pytest.approx(theirs.policy_flops, rel=0.02)  # calls are cut elsewhere
    assert engine.budget.used_bytes == 0 and not engine._scorer.running
    engine.shutdown()


@pytest.mark.slow
def test_two_searches_under_pressure_have_their_trees(device, folders):
    """Pages for little more than one path: nodes are evicted, recomputed and split among calls."""
    searches = dict(width=2, keep=2, depth=2, step_tokens=9)
    prompts = [PROMPT[:9], PROMPT[4:]]
    host = make_engine(*folders, impl="reference")
    expected = [Search(host, p, seed=5, **searches).run() for p in prompts]
    host.shutdown()
    engine = device_engine(folders, device, kv_bytes=1 << 24)
    page_bytes = engine.policy_forest.pool.page_bytes
    engine.shutdown()
    engine = device_engine(folders, device, kv_bytes=18 * page_bytes)
    together = [Search(engine, p, seed=5, **searches) for p in prompts]
    for got, tree in zip(run_together(together), expected, strict=True):
        assert_same_tree(got, tree)
    assert sum(s.session.counters.policy_recomputed + s.session.counters.verifier_recomputed for s in together) > 0
    assert engine.budget.used_bytes == 0
    engine.policy_forest.check_integrity()
    engine.shutdown()


@pytest.mark.slow
def test_two_models_over_one_forest(device, tmp_path):
    """An implicit PRM: log-ratios of the host's, where the last token in front of the new ones is read, too."""
    for name, seed in (("first", 1), ("second", 2)):
        write_tiny(tmp_path / name, "llama", seed=seed, **SMALL)
    results = []
    for options in ({"impl": "reference"}, {"impl": "triton", "device": device}):
        pair = load_pair(tmp_path / "first", tmp_path / "second", torch.float32, **options)
        engine = Engine(None, pair, kv_bytes=1 << 22)
        session, below = engine.open(None, PROMPT[:9]), PROMPT[9:]
        _, ratios = engine.score(session, session.verifier_root, below, range(-1, len(below) - 1), targets=below).result(300)
        results.append(ratios)
        engine.close(session)
        engine.shutdown()
    assert results[1] == pytest.approx(results[0], abs=1e-4) and len(set(results[0])) == 11


class SlowFetch(Fetch):
    """Scores that are ready only when a branch has taken its step, as on a GPU that decodes meanwhile."""

    release: threading.Event

    def ready(self) -> bool:
        return self.release.is_set()

    def wait(self) -> torch.Tensor:
        assert self.release.wait(60)
        return super().wait()


@pytest.fixture
def slow_scores(folders, monkeypatch):
    """A host engine whose scores stay away until the event is set."""
    engine = make_engine(*folders)
    event = threading.Event()

    def fetch(source):
        slow = SlowFetch(source.clone())
        slow.release = event
        return slow

    monkeypatch.setattr(engine.verifier_model.queue, "fetch", fetch)
    yield engine, event
    event.set()
    engine.shutdown()


def test_decoding_goes_on_while_scores_are_computed(slow_scores, cpu_extension):
    engine, event = slow_scores
    session = engine.open(PROMPT, PROMPT, max_new_tokens=150)
    score = engine.score(session, session.verifier_root, [9, 10, 11], [0, 2])
    steps = []

    def on_step(ordinal, end):
        steps.append(score.done())
        if len(steps) == 5:
            event.set()

    engine.branch(
        session, session.root, key=1, ordinals=range(4), path_key=(), sampling=Sampling(1.0), max_step_tokens=9,
        max_length=150, max_steps=9, on_step=on_step,
    )  # fmt: skip
    node, scores = score.result(60)
    assert steps[:5] == [False] * 5 and len(scores) == 2  # five steps ended before the scores were there
    again = engine.score(session, session.verifier_root, [9, 10, 11], [0, 2])
    assert again.result(60)[1] == scores
    engine.close(session)


def test_closing_waits_for_scores_under_way(slow_scores):
    engine, event = slow_scores
    session = engine.open(PROMPT, PROMPT, max_new_tokens=9)
    score = engine.score(session, session.verifier_root, [9, 10], [1])
    other = engine.open(PROMPT, PROMPT, max_new_tokens=9)
    threading.Timer(0.2, event.set).start()
    engine.close(session)
    assert len(score.result(1)[1]) == 1
    engine.close(other)
    assert engine.budget.used_bytes == 0 and not engine._scorer.running


def test_scores_under_way_hear_of_a_broken_engine(slow_scores, monkeypatch):
    engine, event = slow_scores
    session = engine.open(PROMPT, PROMPT, max_new_tokens=9)
    engine.branch(
        session, session.root, key=1, ordinals=[0], path_key=(), sampling=Sampling(1.0), max_step_tokens=99,
        max_length=120, on_step=lambda ordinal, end: None,
    )  # fmt: skip
    score = engine.score(session, session.verifier_root, [9, 10], [1])
    broken = KeyError("a bug")

    def fail():
        raise broken

    engine._commands.call(lambda: monkeypatch.setattr(engine._scorer, "collect", lambda wait=False: fail()))
    assert score.exception(60) is broken
