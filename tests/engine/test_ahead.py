"""Children begun ahead are the very children asked for later: trees, scores and costs do not tell whether any were."""

import queue
import random

import pytest
from engines import Search, make_engine, run_together

from ttskernels.engine.ahead import Decoding, Wish
from ttskernels.engine.keys import root_key
from ttskernels.engine.work import Sampling

PROMPTS = [[(11 * i + 5 * t) % 100 + 8 for t in range(5 + 4 * i)] for i in range(6)]
SHAPE = dict(width=4, keep=3, depth=4)


@pytest.fixture(scope="module")
def plain(folders):
    """Trees and costs with nothing begun ahead, and the peak of all problems together."""
    engine = make_engine(*folders)
    searches = [Search(engine, p, seed=5, **SHAPE) for p in PROMPTS]
    trees = run_together(searches)
    yield trees, [counts(s) for s in searches], engine.budget.peak_bytes
    engine.shutdown()


def counts(search):
    c = search.session.counters
    return c.policy_decoded, c.policy_prefilled, c.policy_reused, c.verifier_prefilled, c.verifier_reused


def leaked(engine):
    ahead = engine._policy.ahead
    assert not ahead._children and not ahead._wishes and not ahead._uncached
    return len(engine.policy_forest._live) + len(engine.verifier_forest._live) + engine.budget.used_bytes


@pytest.mark.parametrize("seed", range(6))
def test_random_wishes_change_neither_trees_nor_costs(folders, plain, seed, cpu_extension):
    engine = make_engine(*folders, ahead_rows=(4, 12, 200)[seed % 3])
    guess = random.Random(seed)
    searches = [Search(engine, p, seed=5, guess=guess, **SHAPE) for p in PROMPTS]
    assert run_together(searches) == plain[0]
    assert [counts(s) for s in searches] == plain[1]
    assert leaked(engine) == 0
    engine.policy_forest.check_integrity()
    if seed % 3 == 2:
        assert sum(s.session.counters.policy_speculated for s in searches) > 0, "wishes this random are often wrong"
    engine.shutdown()


@pytest.mark.parametrize("seed", range(3))
def test_a_quarter_of_the_memory(folders, plain, seed, cpu_extension):
    trees, _, peak = plain
    engine = make_engine(*folders, kv_bytes=peak // 4, ahead_rows=200)
    guess = random.Random(100 + seed)
    searches = [Search(engine, p, seed=5, guess=guess, **SHAPE) for p in PROMPTS]
    assert run_together(searches) == trees
    assert engine.budget.peak_bytes <= peak // 4
    assert leaked(engine) == 0
    engine.shutdown()


def begin(engine, max_step_tokens=12):
    """A session with a long branch under way, beside which children of the first, a short one, may begin."""
    session = engine.open(PROMPTS[2], PROMPTS[2], max_new_tokens=200)
    ends = {}
    events = queue.SimpleQueue()
    key = root_key(0, "x")
    for ordinal, tokens in ((0, 3), (1, 200)):
        engine.branch(
            session, session.root, key=key, ordinals=[ordinal], path_key=(), sampling=Sampling(1.0), max_step_tokens=tokens,
            max_length=230, max_steps=1 if ordinal == 0 else 99, on_step=lambda o, end: events.put((o, end)),
        )  # fmt: skip
    while 0 not in ends:
        ordinal, end = events.get(timeout=60)
        ends.setdefault(ordinal, end)
    return session, ends[0], key


def wish(engine, session, end, count, tokens=4, group=1):
    wishes = [Wish(end.node, end.key, (0,), 0, count)]
    engine.ahead(session, wishes, sampling=Sampling(1.0), max_step_tokens=tokens, max_length=230, group=group)


def test_what_is_begun_is_taken_and_the_rest_counted(folders, cpu_extension):
    engine = make_engine(*folders, ahead_rows=8)
    session, end, _ = begin(engine)
    ahead = engine._policy.ahead
    wish(engine, session, end, 3)
    while not engine._commands.call(lambda: len(ahead.branches()) == 3 and all(b.end for b in ahead.branches())).result():
        pass
    engine._commands.call(lambda: None).result()
    decoding = Decoding(Sampling(1.0), 4, 230)
    children = engine._commands.call(lambda: dict(ahead._children[end.node])).result()
    begun = {o: b.end for (o, d), b in children.items() if d == decoding}
    got = {}
    engine.branch(
        session, end.node, key=end.key, ordinals=[1, 2], path_key=(0,), sampling=Sampling(1.0), max_step_tokens=4,
        max_length=230, on_step=lambda o, e: got.setdefault(o, e),
    )  # fmt: skip
    engine._commands.call(lambda: None).result()
    assert got == {1: begun[1], 2: begun[2]}, "ended before they were asked for: reported at once"
    before = session.counters.policy_decoded
    left = engine._commands.call(lambda: ahead.branches()).result()
    assert [b.path_key for b in left] == [(0, 0)]
    engine.release(session, policy=[end.node])
    engine._commands.call(lambda: None).result()
    assert session.counters.policy_speculated == len(left[0].end.ids) and not ahead.branches()
    assert session.counters.policy_decoded >= before - len(left[0].end.ids)
    engine.close(session)
    assert leaked(engine) == 0
    engine.shutdown()


def test_a_parent_computed_in_vain_is_counted_too(folders, cpu_extension):
    engine = make_engine(*folders, ahead_rows=8)
    session, end, _ = begin(engine)
    ahead = engine._policy.ahead
    wish(engine, session, end, 1)
    while not engine._commands.call(lambda: bool(ahead.branches()) and bool(ahead.branches()[0].end)).result():
        pass
    tokens, counters = len(ahead.branches()[0].node.ids), session.counters

    def let_go():  # in one command: the long branch goes on with steps of its own in between
        prefilled = counters.policy_prefilled
        engine.policy_forest.release(end.node)
        ahead.release(end.node)
        return counters.policy_prefilled - prefilled

    assert engine._commands.call(let_go).result() == -1
    assert counters.policy_speculated == tokens + 1
    engine.shutdown()


def test_closing_or_cancelling_forgets_wishes(folders):
    engine = make_engine(*folders, ahead_rows=8)
    session, end, _ = begin(engine)
    for group in (1, 2):
        wish(engine, session, end, 4, tokens=90, group=group)
    engine.cancel(1)
    assert list(engine._commands.call(lambda: engine._policy.ahead._wishes).result()) == [2]
    engine.close(session)
    assert leaked(engine) == 0
    engine.ahead(session, [], sampling=Sampling(1.0), max_step_tokens=9, max_length=230, group=3)
    engine.shutdown()


def test_nothing_begins_where_the_switch_is_off_or_the_batch_is_full(folders):
    for rows in (0, 1):
        engine = make_engine(*folders, ahead_rows=rows)
        search = Search(engine, PROMPTS[0], seed=5, guess=random.Random(1), sure_share=1.0 - rows, **SHAPE)
        begun = []
        engine._policy.ahead._start = lambda *args, begun=begun: begun.append(args)
        search.run()
        assert not begun
        engine.shutdown()


