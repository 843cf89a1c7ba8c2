"""Every strategy against trees written out by hand: who survives, who votes, and that all KV goes back."""

import asyncio

import pytest
from scripted import ScriptedPolicy
from ttsearch.budget import Budget
from ttsearch.strategies import STRATEGIES, get_strategy
from ttsearch.types import Problem

PROBLEM = Problem("2;a+1?", "3", id="p")


def boxed(answer, score):
    return (f"\\boxed{{{answer}}}", score, "boxed")


def run(name, script, budget, **options):
    strategy = get_strategy(name)
    policy = ScriptedPolicy(script, strategy.prepare(budget), **options)
    result = asyncio.run(strategy.run(PROBLEM, policy, policy.budget))
    assert not policy.held, "KV leaked"
    assert len(set(policy.released)) == len(policy.released), "released twice"
    return result, policy


def keys(nodes):
    return [node.path_key for node in nodes]


def budget(n, width=2, aggregate="min", vote="max", **more):
    return Budget(n, width, aggregate=aggregate, vote=vote, **more)


def test_greedy_is_one_path_at_temperature_zero():
    result, policy = run("greedy", {(0,): ("a\n\n", None), (0, 0): boxed(3, None)}, budget(8, width=3))
    assert (result.answer, result.num_voted, keys(result.candidates)) == ("3", 1, [(0, 0)])
    assert (policy.budget.temperature, policy.budget.n) == (0.0, 1)


def test_majority_counts_paths_and_duplicates():
    script = {(i,): boxed(answer, None) for i, answer in enumerate(["3", "4", "3.0", "4", "3"])}
    result, _ = run("majority", script, Budget(5))
    assert result.answer == "3" and result.votes == {"3": 3.0, "4": 2.0}
    assert result.duplicates == 2  # "3" and "4" each appear twice as text; "3.0" is another text
    assert result.best.path_key == (0,)


def test_majority_tie_goes_to_smallest_path_key():
    script = {(i,): boxed(answer, None) for i, answer in enumerate(["7", "4", "4", "7"])}
    assert run("majority", script, Budget(4))[0].answer == "7"


def test_majority_leaves_out_paths_without_an_answer():
    script = {(0,): ("12 12 12", None, "length"), (1,): ("no words", None, "eos"), (2,): boxed(3, None)}
    result, _ = run("majority", script, Budget(3))
    assert (result.answer, result.num_voted, len(result.candidates)) == ("3", 1, 3)


@pytest.mark.parametrize(
    ("aggregate", "vote", "answer"),
    [
        ("min", "max", "1"),  # 0.5 against 0.3, 0.4, 0.4
        ("last", "max", "2"),  # 0.99
        ("mean", "max", "2"),
        ("product", "max", "2"),  # 0.3 * 0.99 = 0.297 > 0.5 * 0.5
        ("min", "weighted", "3"),  # 0.4 + 0.4
        ("min", "majority", "3"),
        ("min", "softmax", "3"),
    ],
)
def test_best_of_n_rules(aggregate, vote, answer):
    script = {
        (0,): ("a\n\n", 0.5), (0, 0): boxed(1, 0.5),
        (1,): ("b\n\n", 0.3), (1, 0): boxed(2, 0.99),
        (2,): ("c\n\n", 0.4), (2, 0): boxed(3, 0.5),
        (3,): ("c\n\n", 0.4), (3, 0): boxed(3, 0.5),
    }  # fmt: skip
    result, policy = run("best_of_n", script, budget(4, aggregate=aggregate, vote=vote))
    assert result.answer == answer
    assert result.duplicates == 1
    assert policy.expanded == [(((),), 4)], "all samples must be asked for in one call"


def test_best_of_n_ties_by_path_key():
    result, _ = run("best_of_n", {(i,): boxed(i, 0.5) for i in range(3)}, budget(3))
    assert result.best.path_key == (0,) and result.answer == "0"


def test_long_chains_do_not_underflow():
    def script(key):
        return ("s\n\n", 1e-12 if key[0] else 1e-13) if len(key) < 39 else boxed(key[0], 1e-12)

    for vote in ("max", "weighted"):
        result, _ = run("best_of_n", script, budget(2, aggregate="product", vote=vote))
        assert result.answer == "1"


def test_best_of_n_stops_chains_at_max_steps():
    result, _ = run("best_of_n", lambda key: ("1\n\n", 0.5), budget(2, max_steps=3))
    assert keys(result.candidates) == [(0, 0, 0), (1, 0, 0)]
    assert (result.answer, result.num_voted) == (None, 0) and result.best.path_key == (0, 0, 0)


def test_refused_path_never_wins():
    result, _ = run("best_of_n", {(0,): ("9", None, "refused"), (1,): boxed(3, 0.0)}, budget(2))
    assert result.answer == "3" and result.num_voted == 1


BEAM = {
    (0,): ("a", 0.9), (1,): ("b", 0.2), (2,): ("c", 0.8), (3,): ("d", 0.1),
    (0, 0): ("aa", 0.3), (0, 1): ("ab", 0.7), (2, 0): ("ca", 0.6), (2, 1): ("cb", 0.5),
    (0, 1, 0): boxed(3, 0.9), (0, 1, 1): boxed(4, 0.2), (2, 0, 0): boxed(5, 0.55), (2, 0, 1): boxed(4, 0.6),
}  # fmt: skip


def test_beam_search_by_hand():
    result, policy = run("beam_search", BEAM, budget(4))
    assert [call[0] for call in policy.expanded] == [((),), ((0,), (2,)), ((0, 1), (2, 0))]
    assert keys(result.candidates) == [(0, 1, 0), (0, 1, 1), (2, 0, 0), (2, 0, 1)]
    assert result.answer == "3" and result.best.path_key == (0, 1, 0)  # min(0.9, 0.7, 0.9) = 0.7
    assert result.num_voted == 4 and result.votes == {"3": 0.7, "4": 0.6, "5": 0.55}


def test_beam_search_weighted_vote():
    result, _ = run("beam_search", BEAM, budget(4, vote="weighted"))
    assert result.answer == "4" and result.votes["4"] == pytest.approx(0.2 + 0.6)


def test_beam_search_prunes_at_once():
    _, policy = run("beam_search", BEAM, budget(4))
    assert policy.released[:2] == [(1,), (3,)], (
        "losers must give their KV back before the next step is decoded"
    )
    assert policy.peak_held == 2 + 4  # survivors and their children


def test_beam_search_finished_path_keeps_its_slot():
    script = {
        (0,): boxed(1, 0.1), (1,): ("b", 0.9), (2,): ("c", 0.8), (3,): ("d", 0.7),
        (1, 0): boxed(2, 0.9), (1, 1): ("bb", 0.5), (2, 0): ("ca", 0.6),
        (2, 0, 0): boxed(3, 0.6), (2, 0, 1): boxed(4, 0.3),
    }  # fmt: skip
    result, policy = run("beam_search", script, budget(4))
    # 3 free slots: two survivors with 2 and 1 children; then 2 free slots: one survivor with 2.
    assert policy.expanded == [(((),), 4), (((1,), (2,)), [2, 1]), (((2, 0),), [2])]
    assert keys(result.candidates) == [(0,), (1, 0), (2, 0, 0), (2, 0, 1)]
    assert result.num_voted == 4 and result.answer == "2"


def test_beam_search_ties_by_path_key():
    def script(key):
        return ("same", 0.5) if len(key) < 2 else boxed(key[0], 0.5)

    result, policy = run("beam_search", script, budget(6, width=3))
    assert policy.expanded[1][0] == ((0,), (1,))
    assert result.best.path_key == (0, 0) and result.duplicates == 4


def test_beam_search_stops_at_max_steps():
    result, policy = run("beam_search", lambda key: ("1\n\n", 0.5), budget(4, max_steps=3))
    assert len(policy.expanded) == 3 and {len(key) for key in keys(result.candidates)} == {3}
    assert (result.answer, result.num_voted, len(result.candidates)) == (None, 0, 4)


DVTS = {
    (0,): ("a", 0.9), (1,): ("b", 0.95), (2,): ("c", 0.1), (3,): ("d", 0.2),
    (1, 0): ("ba", 0.4), (1, 1): boxed(3, 0.5), (3, 0): ("da", 0.3), (3, 1): ("db", 0.25),
    (3, 0, 0): boxed(4, 0.9), (3, 0, 1): boxed(3, 0.8),
}  # fmt: skip


def test_dvts_subtrees_do_not_compete_and_export_one_path_each():
    result, policy = run("dvts", DVTS, budget(4, vote="weighted"))
    assert keys(result.candidates) == [(1, 1), (3, 0, 0)]
    assert result.num_voted == 2 and result.votes == {"3": 0.5, "4": 0.2}
    assert {call[0] for call in policy.expanded} == {((),), ((1,),), ((3,),), ((3, 0),)}
    assert (0,) in policy.released[:2], "a better path of another subtree must not save this one"


def test_dvts_stops_at_max_steps():
    result, _ = run("dvts", lambda key: ("1\n\n", 0.5), budget(4, max_steps=2))
    assert keys(result.candidates) == [(0, 0), (2, 0)]


@pytest.mark.parametrize("name", STRATEGIES)
def test_same_script_same_tree(name):
    def script(key):
        score = (sum((i + 1) * (7 + k) for i, k in enumerate(key)) % 11) / 11
        return ("s\n\n", score) if len(key) < 4 else boxed(sum(key) % 3, score)

    first, second = (run(name, script, budget(8, aggregate="product", vote="weighted"))[0] for _ in range(2))
    assert first.to_dict() | {"seconds": 0} == second.to_dict() | {"seconds": 0}


@pytest.mark.parametrize("name", ["beam_search", "dvts"])
def test_n_must_be_a_multiple_of_width(name):
    with pytest.raises(
        ValueError, match=r"n must be a multiple of width=4, got 6; use n=4 or 8, or another width"
    ):
        get_strategy(name).prepare(Budget(6, 4, aggregate="min", vote="max"))
    policy = ScriptedPolicy({}, Budget(2, 4, aggregate="min", vote="max"))
    with pytest.raises(ValueError, match="use n=4, or another width"):
        asyncio.run(get_strategy(name).run(PROBLEM, policy, policy.budget))
    assert not policy.expanded


@pytest.mark.parametrize("name", ["best_of_n", "beam_search", "dvts"])
def test_no_hidden_default_rule(name):
    with pytest.raises(ValueError, match=f"{name} needs aggregate, got None; pass Budget"):
        get_strategy(name).prepare(Budget(4))
    with pytest.raises(ValueError, match=f"{name} needs vote, got None; pass Budget"):
        get_strategy(name).prepare(Budget(4, aggregate="min"))


@pytest.mark.parametrize("name", ["best_of_n", "beam_search", "dvts"])
def test_missing_verifier_is_named(name):
    with pytest.raises(ValueError, match="has no score; attach a verifier"):
        run(name, lambda key: boxed(1, 0.5), budget(4), has_verifier=False)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("pause", [0, 1, 2])
def test_cancelled_in_the_middle_releases_everything(name, pause):
    async def cancel():
        strategy = get_strategy(name)
        prepared = strategy.prepare(budget(4))
        policy = ScriptedPolicy(lambda key: ("s\n\n", 0.5), prepared, pause_after=pause)
        task = asyncio.create_task(strategy.run(PROBLEM, policy, prepared))
        waiting = asyncio.create_task(policy.waiting.wait())
        await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
        task.cancel()
        waiting.cancel()
        await asyncio.wait([task])
        assert not policy.held
        assert task.cancelled() or len(policy.expanded) <= pause

    asyncio.run(cancel())


@pytest.mark.parametrize("name", STRATEGIES)
def test_engine_failure_releases_everything_and_is_raised(name):
    policy = ScriptedPolicy(lambda key: ("s\n\n", 0.5), get_strategy(name).prepare(budget(4)), fail_after=0)
    with pytest.raises(RuntimeError, match="the engine broke"):
        asyncio.run(get_strategy(name).run(PROBLEM, policy, policy.budget))
    assert not policy.held


@pytest.mark.parametrize("name", ["beam_search", "dvts"])
def test_engine_failure_later_releases_everything(name):
    policy = ScriptedPolicy(lambda key: ("s\n\n", 0.5), get_strategy(name).prepare(budget(8)), fail_after=3)
    with pytest.raises(RuntimeError, match="the engine broke"):
        asyncio.run(get_strategy(name).run(PROBLEM, policy, policy.budget))
    assert not policy.held
