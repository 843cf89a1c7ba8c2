"""The engine on tiny random models: the same trees whatever shares the batch and however little memory there is."""

import queue
import threading

import pytest
import torch
from engines import END, STEP, Search, make_engine, run_together, stop_table
from tiny_models import write_tiny

from ttskernels.engine import policy
from ttskernels.engine.batcher import Engine
from ttskernels.engine.keys import root_key
from ttskernels.engine.work import Sampling
from ttskernels.kv.free_pages import FreeRuns
from ttskernels.kv.machines import gpu_machine
from ttskernels.kv.plan import build_plan
from ttskernels.kv.plan_layout import PAGE_BREAKS
from ttskernels.models import load_model

PROMPT = [3, 9, 11, 24, 90, 17, 33, 2, 8, 120, 44, 61, 70, 15, 19, 77, 101, 6, 52, 40]


@pytest.fixture
def engine(folders):
    engine = make_engine(*folders)
    yield engine
    engine.shutdown()


def prompts(count):
    return [[(7 * i + t) % 100 + 8 for t in PROMPT[: 5 + 3 * i]] for i in range(count)]


def leaked(engine):
    return len(engine.policy_forest._live) + len(engine.verifier_forest._live) + engine.budget.used_bytes


def test_a_search_is_deterministic_and_leaks_nothing(engine):
    first = Search(engine, PROMPT, seed=0).run()
    second = Search(engine, PROMPT, seed=0).run()
    other = Search(engine, PROMPT, seed=1).run()
    assert first == second != other
    assert len(first) > 8 and all(0 <= score <= 1 for _, _, score in first.values())
    assert leaked(engine) == 0


def test_problems_together_equal_problems_alone(engine, cpu_extension):
    alone = [Search(engine, p, seed=3).run() for p in prompts(8)]
    assert run_together([Search(engine, p, seed=3) for p in prompts(8)]) == alone
    assert leaked(engine) == 0


def test_shutdown_frees_the_pages_whoever_refers_to_the_engine(folders):
    engine = make_engine(*folders)
    pools = engine.policy_forest.pool, engine.verifier_forest.pool
    Search(engine, PROMPT, seed=0).run()
    assert all(pool.k.nbytes and pool.v.nbytes for pool in pools)
    engine.shutdown()
    engine.shutdown()
    assert not any(pool.k.nbytes + pool.v.nbytes for pool in pools)


@pytest.mark.parametrize("kv", ["float", "int8"])
def test_a_quarter_of_the_memory_changes_nothing_but_time(folders, kv, cpu_extension):
    searches = dict(width=4, keep=3, depth=4)
    roomy = make_engine(*folders, kv=kv)
    expected = [Search(roomy, p, seed=5, **searches).run() for p in prompts(8)]
    peak = roomy.budget.peak_bytes
    roomy.shutdown()
    tight = make_engine(*folders, kv_bytes=peak // 4, kv=kv)
    together = [Search(tight, p, seed=5, **searches) for p in prompts(8)]
    assert run_together(together) == expected
    assert tight.budget.peak_bytes <= peak // 4
    assert sum(s.session.counters.policy_recomputed + s.session.counters.verifier_recomputed for s in together) > 0
    assert leaked(tight) == 0
    tight.shutdown()


def test_pools_that_have_their_memory_from_the_start_share_the_budget(folders, cpu_extension):
    """As on a GPU: both together are no larger than the budget, and pressure in one evicts nothing of the other."""
    policy, verifier = (load_model(folder, torch.float32) for folder in folders)
    policy.reserves_pool = verifier.reserves_pool = True
    searches = dict(width=4, keep=3, depth=4)
    roomy = Engine(policy, verifier, next_state=stop_table(), kv_bytes=1 << 28)
    expected = [Search(roomy, p, seed=5, **searches).run() for p in prompts(8)]
    page_bytes = sum(f.pool.page_bytes for f in (roomy.policy_forest, roomy.verifier_forest))
    roomy.shutdown()
    tight = Engine(policy, verifier, next_state=stop_table(), kv_bytes=16 * page_bytes)
    pools = [tight.policy_forest.pool, tight.verifier_forest.pool]
    assert sum(p.k.nbytes + p.v.nbytes for p in pools) <= tight.budget.total_bytes
    assert pools[0].num_pages == pools[1].num_pages
    together = [Search(tight, p, seed=5, **searches) for p in prompts(8)]
    assert run_together(together) == expected
    assert sum(s.session.counters.policy_recomputed + s.session.counters.verifier_recomputed for s in together) > 0
    with pytest.raises(ValueError, match="raise kv_bytes or lower max_new_tokens"):
        tight.open(PROMPT, PROMPT, max_new_tokens=250 - len(PROMPT))
    assert leaked(tight) == 0
    tight.shutdown()


def test_tokens_equal_a_plain_decode_loop(folders, engine, cpu_extension):
    """Against transformers: greedy tokens of a branch, continued through a fork."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32)
    session = engine.open(PROMPT, None, max_new_tokens=24)
    done, ends = threading.Event(), []

    def on_step(ordinal, end):
        ends.append(end)
        if not end.more:
            done.set()

    engine.branch(session, session.root, key=1, ordinals=[0], path_key=(), sampling=Sampling(0.0),
                  max_step_tokens=12, max_length=len(PROMPT) + 24, max_steps=9, on_step=on_step)  # fmt: skip
    assert done.wait(60)
    got = [t for end in ends for t in end.ids]
    ids = torch.tensor([PROMPT])
    while ids.shape[1] < len(PROMPT) + len(got):
        ids = torch.cat([ids, reference(ids).logits[:, -1:].argmax(-1)], 1)
    assert got == ids[0, len(PROMPT) :].tolist()
    engine.close(session)


def test_counters_follow_the_tree(engine):
    search = Search(engine, PROMPT, seed=0, width=4, keep=1, depth=2)
    tree = search.run()
    counters = search.session.counters
    assert counters.policy_decoded == sum(len(ids) for ids, _, _ in tree.values())
    survivor = max(
        (k for k in tree if len(k) == 1 and tree[k][1] == "step"), key=lambda k: (tree[k][2], -k[0]), default=None
    )
    flushed = 1 if survivor is not None else 0  # the survivor's last token is computed once for its four children
    assert counters.policy_prefilled == len(PROMPT) + flushed
    assert counters.verifier_prefilled == len(PROMPT) + counters.policy_decoded
    assert counters.policy_recomputed == counters.verifier_recomputed == 0
    assert counters.policy_flops > 0 and counters.verifier_flops > 0


def test_counters_do_not_depend_on_when_children_are_asked_for(engine):
    """Two requests for children of one prompt: the second before anything was computed, or after the first has ended."""
    counted = []
    for together in (True, False):
        session = engine.open(prompts(3)[2], None, max_new_tokens=12)
        ends: queue.SimpleQueue = queue.SimpleQueue()
        both_asked = threading.Event()
        if together:
            engine._commands.call(both_asked.wait)
        for ordinal in (0, 1):
            engine.branch(
                session, session.root, key=9, ordinals=[ordinal], path_key=(), sampling=Sampling(1.0), max_step_tokens=12,
                max_length=10**6, on_step=lambda o, end, ends=ends: ends.put(end),
            )  # fmt: skip
            if not together:
                assert ends.get(timeout=60).ids
        if together:
            both_asked.set()
            assert ends.get(timeout=60).ids and ends.get(timeout=60).ids
        c, length = session.counters, len(session.root.ids)
        counted.append((c.policy_decoded, c.policy_prefilled, c.policy_reused))
        assert counted[-1][1:] == (length, length)
        engine.close(session)
    assert counted[0] == counted[1]


def test_closing_in_the_middle_frees_everything(engine):
    session = engine.open(PROMPT, PROMPT, max_new_tokens=200)
    started = threading.Event()
    engine.branch(session, session.root, key=root_key(0, "x"), ordinals=range(16), path_key=(), sampling=Sampling(1.0),
                  max_step_tokens=200, max_length=230, max_steps=99, on_step=lambda o, e: started.set())  # fmt: skip
    assert started.wait(60)
    engine.close(session)
    engine.close(session)
    assert leaked(engine) == 0


def test_bad_input_is_refused_before_work_starts(engine, folders):
    with pytest.raises(ValueError, match="prompt must hold at least one token id"):
        engine.open([], None, max_new_tokens=5)
    with pytest.raises(ValueError, match=r"prompt must hold ids in 0 .. 130, got 131"):
        engine.open([1, 131], None, max_new_tokens=5)
    with pytest.raises(ValueError, match="prompt has 300 tokens, the policy allows 256"):
        engine.open([1] * 300, None, max_new_tokens=5)
    with pytest.raises(ValueError, match="0 <= temperature"):
        Sampling(-1.0)
    small = make_engine(*folders, kv_bytes=1 << 16)
    with pytest.raises(ValueError, match="raise kv_bytes or lower max_new_tokens"):
        small.open(PROMPT, PROMPT, max_new_tokens=200)
    small.shutdown()


def test_a_path_past_the_verifier_limit_is_an_error_of_that_job_only(engine):
    session = engine.open(PROMPT, PROMPT, max_new_tokens=5)
    too_long = engine.score(session, session.verifier_root, [9] * 250, [249])
    fine = engine.score(session, session.verifier_root, [9] * 3, [2])
    with pytest.raises(ValueError, match="the verifier allows 256"):
        too_long.result(60)
    assert 0 <= fine.result(60)[1][0] <= 1
    with pytest.raises(ValueError, match="reads must be indices into ids"):
        engine.score(session, session.verifier_root, [9], [1])
    engine.close(session)


def test_several_reads_of_one_job_equal_step_by_step(engine, cpu_extension):
    session = engine.open(PROMPT, PROMPT, max_new_tokens=5)
    at_once = engine.score(session, session.verifier_root, [9, STEP, 12, 13, END], [1, 4]).result(60)[1]
    first, (a,) = engine.score(session, session.verifier_root, [9, STEP], [1]).result(60)
    _, (b,) = engine.score(session, first, [12, 13, END], [2]).result(60)
    assert at_once == pytest.approx([a, b], abs=1e-5)
    engine.close(session)


@pytest.mark.parametrize("tokens", [9, 12, 15])
def test_a_long_step_is_what_single_forwards_give(tmp_path, tokens):
    """A sibling that ends early leaves the other with more free slots than one call decodes: its plan serves a second."""
    model = write_tiny(tmp_path, "llama", seed=4)
    table = torch.zeros(1, 131, dtype=torch.int32)
    engine = Engine(load_model(tmp_path, torch.float32), next_state=table, kv_bytes=1 << 24)
    session = engine.open(PROMPT, max_new_tokens=100)
    ends = queue.SimpleQueue()
    for ordinal, length in enumerate((tokens, 90)):
        engine.branch(
            session, session.root, key=root_key(0, "x"), ordinals=[ordinal], path_key=(), sampling=Sampling(0.0),
            max_step_tokens=length, max_length=10**6, on_step=lambda o, end: ends.put(end),
        )  # fmt: skip
    short, long = (ends.get(timeout=60) for _ in range(2))
    engine.shutdown()
    ids = list(PROMPT)
    with torch.inference_mode():
        while len(ids) < len(PROMPT) + 90:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert list(long.ids) == ids[len(PROMPT) :] and short.ids == long.ids[:tokens]


@pytest.mark.parametrize("runs", [True, False])
def test_branches_of_a_device_pool_grow_on_pages_that_follow_each_other(folders, monkeypatch, runs):
    """16 branches of up to 80 tokens, a few at a time: no plan for a GPU has a page break, so its kernels read boxes."""
    breaks = []

    def planned(forest, rows, heads, **options):
        breaks.append(build_plan(forest, rows, heads, machine=gpu_machine(heads)).header[PAGE_BREAKS])
        return build_plan(forest, rows, heads, **options)

    monkeypatch.setattr(policy, "build_plan", planned)
    rare = torch.zeros(1, 131, dtype=torch.int32)
    rare[0, STEP], rare[0, END] = -1, -2
    models = (load_model(folder, torch.float32) for folder in folders)
    engine = Engine(*models, next_state=rare, kv_bytes=1 << 28)
    for pool in (engine.policy_forest.pool, engine.verifier_forest.pool):
        if runs:  # as a strided pool has them
            pool.keeps_runs, pool._free = True, FreeRuns(pool._used)
    Search(engine, PROMPT * 10, seed=3, width=4, keep=4, depth=5, step_tokens=80).run()
    assert leaked(engine) == 0
    engine.shutdown()
    assert len(breaks) > 8 and any(breaks) != runs
