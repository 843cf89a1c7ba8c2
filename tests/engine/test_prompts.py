"""Prompts of closed sessions stay computed for the next session that has them, and go as soon as somebody needs room."""

import pytest
from engines import Search, make_engine, run_together

PROMPTS = [[(7 * i + 3 * t) % 100 + 8 for t in range(5 + 6 * i)] for i in range(6)]


def held(engine):
    return [engine._sessions.prompts[forest].nodes for forest in (engine.policy_forest, engine.verifier_forest)]


def assert_clean(engine):
    engine.forget_prompts()
    assert not engine.policy_forest._live and not engine.verifier_forest._live and engine.budget.used_bytes == 0


def test_the_second_strategy_computes_no_token_of_the_prompt(folders):
    plain = make_engine(*folders)
    expected = [Search(plain, PROMPTS[3], seed=0, keep=keep).run() for keep in (2, 3)]
    plain.shutdown()
    engine = make_engine(*folders, prompt_bytes=1 << 20)
    searches = [Search(engine, PROMPTS[3], seed=0, keep=keep) for keep in (2, 3)]
    assert [search.run() for search in searches] == expected
    first, second = (search.session.counters for search in searches)
    length = len(PROMPTS[3])
    scored = [sum(len(ids) for ids, _, _ in search.tree.values()) for search in searches]
    assert first.verifier_prefilled == length + scored[0] and second.verifier_prefilled == scored[1]
    steps = [sum(1 for _, reason, _ in search.tree.values() if reason == "step") for search in searches]
    assert length <= first.policy_prefilled <= length + steps[0] and second.policy_prefilled <= steps[1]
    assert second.policy_recomputed == second.verifier_recomputed == 0
    assert_clean(engine)
    engine.shutdown()


@pytest.mark.parametrize("part", [4, 8])
def test_little_memory_changes_nothing(folders, cpu_extension, part):
    roomy = make_engine(*folders)
    expected = [Search(roomy, p, seed=5).run() for p in PROMPTS]
    peak = roomy.budget.peak_bytes
    roomy.shutdown()
    tight = make_engine(*folders, kv_bytes=peak * 3 // part, prompt_bytes=peak)
    for _ in range(2):
        assert run_together([Search(tight, p, seed=5) for p in PROMPTS]) == expected
    assert any(held(tight))
    assert_clean(tight)
    tight.shutdown()


def test_no_more_than_their_share_is_kept_the_newest_last(folders):
    engine = make_engine(*folders)
    pool = engine.policy_forest.pool
    engine.shutdown()
    engine = make_engine(*folders, prompt_bytes=4 * pool.page_bytes)
    for prompt in PROMPTS[:4]:  # of 1, 1, 2 and 2 pages
        Search(engine, prompt, seed=1).run()
    policy, _ = held(engine)
    assert [node.ids for node in policy] == PROMPTS[2:4]
    Search(engine, PROMPTS[2], seed=1).run()
    assert [node.ids for node in held(engine)[0]] == [PROMPTS[3], PROMPTS[2]]
    search = Search(engine, PROMPTS[5], seed=1)
    search.run()
    kept = sum(len(n.pages) for n in held(engine)[0]) * pool.page_bytes
    assert 0 < kept <= 4 * pool.page_bytes
    assert_clean(engine)
    engine.shutdown()


def test_what_was_never_computed_or_cut_in_two_is_not_kept(folders):
    engine = make_engine(*folders, prompt_bytes=1 << 20)
    prompt = PROMPTS[4]
    engine.close(engine.open(prompt, prompt))
    assert held(engine) == [[], []]
    session = engine.open(prompt, prompt)
    _, whole = engine.score(session, session.verifier_root, [3, 4], [1]).result(timeout=60)
    engine.score(session, session.verifier_root, [3, 4], [1], keep=len(prompt) - 2).result(timeout=60)
    engine.close(session)
    assert held(engine) == [[], []]
    again = engine.open(prompt, prompt)
    _, scores = engine.score(again, again.verifier_root, [3, 4], [1]).result(timeout=60)
    assert scores == whole
    engine.close(again)
    assert [node.ids for node in held(engine)[1]] == [prompt]
    assert_clean(engine)
    engine.shutdown()


def test_what_is_kept_is_not_a_problems_own_peak(folders):
    engine = make_engine(*folders, prompt_bytes=1 << 24)
    alone = Search(engine, PROMPTS[0], seed=2)
    alone.run()
    engine.forget_prompts()
    for prompt in PROMPTS[1:]:
        Search(engine, prompt, seed=2).run()
    assert sum(len(node.pages) for node in held(engine)[0]) > 4
    beside = Search(engine, PROMPTS[0], seed=2)
    beside.run()
    assert beside.session.counters.peak_kv_bytes == alone.session.counters.peak_kv_bytes > 0
    engine.shutdown()
    assert engine.budget.used_bytes == 0


def test_two_open_sessions_of_one_prompt_have_their_own(folders, cpu_extension):
    engine = make_engine(*folders, prompt_bytes=1 << 20)
    expected = Search(engine, PROMPTS[2], seed=3).run()
    twins = [Search(engine, PROMPTS[2], seed=3) for _ in range(2)]
    assert run_together(twins) == [expected, expected]
    assert [len(nodes) for nodes in held(engine)] == [1, 1]
    assert_clean(engine)
    engine.shutdown()
