"""Which children of an `expand` under way are sure to be continued; and that no tree tells whether they were begun ahead."""

import random
import time
from math import ceil

import pytest
import torch
from ttsearch.aggregate import ranked
from ttsearch.budget import Budget
from ttsearch.demo import policy_path, verifier_path
from ttsearch.policies.local import LocalBackend
from ttsearch.policies.lookahead import SPECULATE, next_parents
from ttsearch.solve import solve, solve_many
from ttsearch.tree import walk
from ttsearch.types import Problem, SearchNode

RULES = dict(aggregate="product", vote="weighted", temperature=1.0, max_tokens=100, max_step_tokens=30, width=2)
PROBLEMS = [Problem("2;a+57;b-49;c+8;d-7?"), Problem("53;a+19;b+14?"), Problem("7;a*8;b-19;c+45;d-60;e*3?")]


def child(draw, ordinal):
    finished = draw.random() < 0.2
    return SearchNode(None, (ordinal,), "s", 1, draw.randint(0, 8) / 8, finished, "boxed" if finished else "step")


def wrap(node):
    """Below a root, so that its path has a step."""
    node.parent = SearchNode()
    return node


@pytest.mark.parametrize("seed", range(40))
def test_sure_is_sure_whatever_the_rest_turns_out_to_be(seed):
    draw = random.Random(seed)
    width, total = draw.choice((2, 3, 4)), draw.randint(1, 20)
    nodes = [wrap(child(draw, i)) for i in range(total)]
    draw.shuffle(nodes)
    for done in range(total):
        sure, count = next_parents(nodes[:done], total, width, "last", "sure")
        likely, also = next_parents(nodes[:done], total, width, "last", "likely")
        assert len(sure) == count == also and likely[:count] == sure
        for _ in range(10):
            rest = [wrap(child(draw, node.path_key[0])) for node in nodes[done:]]
            alive = [n for n in [*nodes[:done], *rest] if not n.finished]
            survivors = ranked(alive, "last")[: ceil(len(alive) / width)]  # as beam_search has it
            assert all(node in survivors for node in sure)


def test_all_places_are_sure_in_the_end():
    nodes = [wrap(SearchNode(None, (i,), "s", 1, i / 16)) for i in range(16)]
    assert next_parents(nodes[:15], 16, 4, "last", "sure") == (nodes[14:11:-1], 3)
    assert next_parents(nodes[:12], 16, 4, "last", "sure") == ([], 0)
    assert next_parents(nodes[:12], 16, 4, "last", "likely") == (nodes[11:8:-1], 0)
    assert next_parents(nodes[:1], 16, 4, "last", "likely") == (nodes[:1], 0)
    assert next_parents([], 16, 4, "last", "likely") == ([], 0)


def test_scores_that_do_not_rank_start_nothing():
    assert next_parents([wrap(SearchNode(None, (0,), "s", 1, None))] * 2, 3, 2, "last", "sure") == ([], 0)


def test_unknown_switch():
    with pytest.raises(ValueError, match="speculate must be one of off, sure, likely, got 'on'"):
        LocalBackend.load(policy_path(), speculate="on")


def load(speculate, **options):
    """The demo models; a step may end at many tokens, so that steps are ragged. The last branches of a batch take their
    time, as those of a larger model do: strategies have enough of it to say what goes on."""
    backend = LocalBackend.load(policy_path(), verifier_path(), speculate=speculate, keep_prompts=False, **options)
    runner, step = backend.engine._policy, backend.engine._policy.step

    def slow_step():
        if speculate != "off" and len(runner.branches) < runner.ahead_rows:
            time.sleep(0.004)
        return step()

    runner.step = slow_step
    draw = torch.Generator().manual_seed(1)
    ends = torch.rand(backend.engine._policy.next_state.shape, generator=draw) < 0.12
    table = backend.engine._policy.next_state
    table[ends & (table >= 0)] = -1
    return backend


def tree(result):
    return {n.path_key: (n.text, n.finish_reason, n.step_score, n.logprob, n.pruned) for n in walk(result.root)}


@pytest.fixture(scope="module")
def plain():
    with load("off") as backend:
        return {
            (strategy, n): solve(PROBLEMS[2], backend=backend, strategy=strategy, n=n, **RULES)
            for strategy in ("beam_search", "dvts", "best_of_n")
            for n in (8, 24)
        }


@pytest.mark.parametrize("speculate", SPECULATE[1:])
def test_same_trees_and_costs(plain, speculate, cpu_extension):
    with load(speculate) as backend:
        begun = []
        take = backend.engine._policy.ahead.take
        backend.engine._policy.ahead.take = lambda *args: begun.append(take(*args)) or begun[-1]
        for (strategy, n), expected in plain.items():
            result = solve(PROBLEMS[2], backend=backend, strategy=strategy, n=n, **RULES)
            assert tree(result) == tree(expected)
            ours, theirs = result.cost.policy, expected.cost.policy
            assert (ours.tokens_decoded, ours.tokens_prefilled, ours.tokens_reused) == (
                theirs.tokens_decoded, theirs.tokens_prefilled, theirs.tokens_reused
            )  # fmt: skip
            assert result.cost.verifier.tokens_prefilled == expected.cost.verifier.tokens_prefilled
            assert speculate == "likely" or ours.tokens_speculated == 0, "who is sure is never dropped"
            assert not backend.engine.policy_forest._live and not backend.engine.verifier_forest._live
        # Not asserted of "sure": here its survivors are known too late to begin anything (see bench/LOG.md).
        assert speculate == "sure" or any(branch is not None for branch in begun), "nothing was begun ahead"


@pytest.mark.parametrize("strategy", ["beam_search", "dvts"])
def test_problems_together_in_a_quarter_of_the_memory(strategy, cpu_extension):
    problems = [Problem(f"{7 + i};a+5{i};b-2{i};c+1{i};d-{i + 2}?") for i in range(6)]
    budget = Budget(8, **RULES | {"max_tokens": 70})
    with load("off") as backend:
        roomy = solve_many(problems, backend, strategy, budget, concurrency=6)
    peak = max(r["cost"]["peak_kv_bytes"] for r in roomy)
    with load("likely", kv_bytes=peak // 4) as backend:
        tight = solve_many(problems, backend, strategy, budget, concurrency=6)
        backend.engine.forget_prompts()
        assert backend.engine.budget.peak_bytes <= peak // 4 and not backend.engine.budget.used_bytes
    drop = ("seconds", "cost")
    assert [{k: v for k, v in r.items() if k not in drop} for r in roomy] == [
        {k: v for k, v in r.items() if k not in drop} for r in tight
    ]
