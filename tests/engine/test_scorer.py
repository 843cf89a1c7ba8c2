"""Scoring with rollback: a chain climbed and cut anywhere gives the bits of an independent chain with the same cuts."""

import random
from concurrent.futures import CancelledError

import pytest
import torch
from tiny_models import rewrite, write_tiny

from ttskernels.engine.batcher import Engine
from ttskernels.models import load_model

PROMPT = [3, 9, 11, 24, 90, 17, 33, 2, 8, 120, 44, 61, 70, 15, 19, 77, 101, 6, 52, 40]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verifier")
    write_tiny(folder, "llama", seed=2, kind="ForTokenClassification", num_labels=2)
    return folder


def engine_of(folder, dtype=torch.float32, impl="auto", kv_bytes=1 << 26, kv="auto"):
    return Engine(None, load_model(folder, dtype, impl, kv=kv), kv_bytes=kv_bytes)


@pytest.fixture
def engine(folder):
    engine = engine_of(folder)
    yield engine
    engine.shutdown()


def on_engine(engine, function):
    return engine._commands.call(function).result(60)


def chain(engine, node):
    """(ids of each node from the root) as they are now."""
    return on_engine(engine, lambda: [list(n.ids) for n in engine.verifier_forest.path(node)])


def record_cuts(engine):
    """Remember the cuts every job was scored with; a later job may cut its chain again."""
    cuts, run = {}, engine._scorer._run

    def recording(jobs):
        for job in jobs:
            cuts[job.node] = [list(n.ids) for n in engine.verifier_forest.path(job.node)]
        return run(jobs)

    engine._scorer._run = recording
    return cuts


def independent(engine, pieces, reads):
    """Scores of the last piece, every piece scored alone, one behind the other, in a session of its own."""
    session = engine.open(None, pieces[0])
    node, scores = session.verifier_root, None
    for piece in pieces[1:]:
        last = piece is pieces[-1]
        node, scores = engine.score(session, node, piece, reads if last else [len(piece) - 1]).result(60)
    engine.close(session)
    return scores


def random_ids(rng, least=1, most=40):
    return [rng.randrange(8, 131) for _ in range(rng.randint(least, most))]


@pytest.mark.parametrize("dtype, kv", [(torch.float32, "float"), (torch.bfloat16, "float"), (torch.bfloat16, "int8")])
@pytest.mark.parametrize("tokens", [100_000, 400])
@pytest.mark.parametrize("seed", range(3))
def test_random_walks_give_the_bits_of_independent_chains(folder, seed, dtype, kv, tokens, cpu_extension):
    """Jobs at once, rolled back anywhere, cancelled, released, under a budget that holds one path and little more."""
    rng = random.Random(seed)
    model = load_model(folder, dtype, kv=kv)
    walk = engine_of(folder, dtype, kv_bytes=tokens * model.kv_bytes_per_token, kv=kv)
    plain = engine_of(folder, dtype, kv=kv)
    cuts = record_cuts(walk)
    sessions = [walk.open(None, PROMPT[: 7 + 6 * i]) for i in range(2)]
    held = {session: [] for session in sessions}  # (node, its ids from the first one)
    recomputed = rolled_back = 0
    for _ in range(12):
        jobs = []
        for _ in range(rng.randint(1, 5)):
            session = rng.choice(sessions)
            root = session.verifier_root
            parent, ids = rng.choice([(root, PROMPT[: 7 + 6 * sessions.index(session)]), *held[session]])
            keep = rng.choice([None, len(ids), rng.randint(0, len(ids)), max(0, len(ids) - rng.randint(0, 5))])
            kept = ids if keep is None else ids[:keep]
            new = random_ids(rng)
            if len(kept) + len(new) > 200:
                continue
            reads = sorted(rng.sample(range(len(new)), rng.randint(1, min(3, len(new)))))
            future = walk.score(session, parent, new, reads, keep)
            rolled_back += len(kept) < len(ids)
            if rng.random() < 0.15:
                future.cancel()
            jobs.append((session, kept + new, reads, future))
        for session, ids, reads, future in jobs:
            try:
                node, scores = future.result(60)
            except CancelledError:
                continue
            assert [t for piece in cuts[node] for t in piece] == ids
            assert [t for piece in chain(walk, node) for t in piece] == ids
            if len(cuts[node]) > 1:  # a chain of its own (keep 0) has nothing above it to compare with
                assert scores == independent(plain, cuts[node], reads)
            held[session].append((node, ids))
        for session in sessions:
            rng.shuffle(held[session])
            gone = [held[session].pop() for _ in range(len(held[session]) // 3)]
            walk.release(session, verifier=[node for node, _ in gone])
        on_engine(walk, walk.verifier_forest.check_integrity)
    recomputed = sum(session.counters.verifier_recomputed for session in sessions)
    assert rolled_back > 5 and recomputed > 0
    assert walk.budget.peak_bytes <= walk.budget.total_bytes
    for session in sessions:
        walk.close(session)
    assert not walk.verifier_forest._live and walk.budget.used_bytes == 0
    walk.shutdown(), plain.shutdown()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chain_of_its_own_scores_what_it_says(folder, dtype):
    """keep=0: nothing of the parent stays."""
    engine = engine_of(folder, dtype)
    session, other = engine.open(None, PROMPT), engine.open(None, [99])
    _, whole = engine.score(session, session.verifier_root, PROMPT[::-1], [0, 19], keep=0).result(60)
    _, again = engine.score(other, other.verifier_root, PROMPT[::-1], [0, 19], keep=0).result(60)
    assert whole == again
    node = session.verifier_root
    assert on_engine(engine, lambda: node.children) == 0
    engine.shutdown()


def test_cutting_a_node_whose_children_are_alive(engine):
    """The old branch keeps its tokens, grows on, and agrees with a chain that was never cut within rounding."""
    session = engine.open(None, PROMPT)
    middle, _ = engine.score(session, session.verifier_root, PROMPT[:30], [19]).result(60)
    child, (before,) = engine.score(session, middle, PROMPT[:9], [8]).result(60)
    branch, _ = engine.score(session, child, [50, 51], [1], keep=len(PROMPT) + 7).result(60)
    assert [len(piece) for piece in chain(engine, branch)] == [20, 7, 2]
    assert [len(piece) for piece in chain(engine, child)] == [20, 7, 13, 9]
    grown, _ = engine.score(session, child, [60, 61], [1]).result(60)
    assert [t for piece in chain(engine, grown) for t in piece] == [*PROMPT, *PROMPT, *PROMPT[:9], 60, 61]
    _, (after,) = engine.score(session, middle, PROMPT[:9], [8]).result(60)
    assert after == pytest.approx(before, abs=1e-5)
    engine.release(session, verifier=[middle, child])
    on_engine(engine, engine.verifier_forest.check_integrity)
    engine.close(session)
    assert not engine.verifier_forest._live


def test_tokens_are_counted_once_across_a_cut(engine):
    session = engine.open(None, PROMPT)
    node, _ = engine.score(session, session.verifier_root, [20] * 30, [29]).result(60)
    assert session.counters.verifier_prefilled == 50
    engine.score(session, node, [21] * 4, [3], keep=45).result(60)
    assert session.counters.verifier_prefilled == 54 and session.counters.verifier_recomputed == 0
    assert session.counters.verifier_reused == 45
    engine.score(session, node, [22], [0]).result(60)  # below the lower half: its five tokens once more
    assert session.counters.verifier_prefilled == 55 and session.counters.verifier_recomputed == 5


def test_a_released_parent_does_not_pull_the_chain_from_under_a_waiting_job(engine):
    session = engine.open(None, PROMPT)
    node, _ = engine.score(session, session.verifier_root, [20] * 5, [4]).result(60)
    waiting = engine.score(session, node, [21], [0])
    engine.release(session, verifier=[node])
    below, scores = waiting.result(60)
    assert len(scores) == 1
    engine.release(session, verifier=[below])
    with pytest.raises(CancelledError):
        engine.score(session, below, [21], [0]).result(60)


def test_bad_input(engine, folder):
    session = engine.open(None, PROMPT)
    with pytest.raises(ValueError, match=r"keep must be in 0 .. 20, the tokens of parent's chain, got 21"):
        engine.score(session, session.verifier_root, [9], [0], keep=21).result(60)
    with pytest.raises(ValueError, match="path has 257 verifier tokens, the verifier allows 256"):
        engine.score(session, session.verifier_root, [9] * 250, [0], keep=7).result(60)
    assert engine.score(session, session.verifier_root, [9] * 246, [0], keep=7).result(60)[1]
    with pytest.raises(ValueError, match="needs a policy, a verifier or both"):
        Engine()
    with pytest.raises(ValueError, match="prompt: the engine was made without the model"):
        engine.open(PROMPT, PROMPT)
    with pytest.raises(ValueError, match="prompt and verifier_prompt are both None"):
        engine.open(None)
    with pytest.raises(ValueError, match="next_state is None"):
        Engine(load_model(folder), kv_bytes=1 << 20)


def test_a_score_that_is_not_finite_is_refused_and_the_session_goes_on(tmp_path):
    write_tiny(tmp_path, "llama", seed=2, kind="ForTokenClassification", num_labels=2)

    def poison(tensors):
        tensors["model.embed_tokens.weight"][66] = float("inf")

    rewrite(tmp_path, poison)
    engine = engine_of(tmp_path)
    session = engine.open(None, PROMPT)
    bad = engine.score(session, session.verifier_root, [9, 66, 10], [0, 2])
    good = engine.score(session, session.verifier_root, [9, 67, 10], [0, 2])
    with pytest.raises(ValueError, match="hidden state or score is not finite"):
        bad.result(60)
    assert all(0 <= score <= 1 for score in good.result(60)[1])
    assert engine.score(session, session.verifier_root, [9], [0]).result(60)[1]
    engine.close(session)
    assert not engine.verifier_forest._live
    engine.shutdown()

    def poison_head(tensors):
        tensors["score.weight"][0, 0] = float("nan")

    rewrite(tmp_path, poison_head)
    with pytest.raises(ValueError, match="score head with weights that are not finite"):
        engine_of(tmp_path)
