"""Budgets, aggregation, votes and the plain data types."""

import math

import pytest
from ttsearch.aggregate import display_score, path_score, ranked
from ttsearch.budget import Budget
from ttsearch.tree import kept_leaves, walk
from ttsearch.types import Cost, ModelCost, Problem, SearchNode
from ttsearch.vote import elect


def chain(key, scores, answer="1", reason="boxed"):
    """A finished path that took these step scores."""
    node = SearchNode()
    for depth, score in enumerate(scores):
        last = depth == len(scores) - 1
        node = SearchNode(
            node,
            (*key, *[0] * depth),
            f"\\boxed{{{answer}}}" if last else "s\n\n",
            1,
            score,
            last and bool(reason),
            reason,
        )
    return node


@pytest.mark.parametrize(
    ("rule", "expected"), [("product", math.log(0.24)), ("min", 0.5), ("mean", 1.9 / 3), ("last", 0.6)]
)
def test_aggregates(rule, expected):
    assert path_score(chain((0,), [0.8, 0.5, 0.6]), rule) == pytest.approx(expected)


def test_product_is_kept_as_a_logarithm():
    long, longer = chain((0,), [1e-9] * 60), chain((1,), [1e-9] * 61)
    assert path_score(long, "product") > path_score(longer, "product") > -math.inf
    assert path_score(chain((0,), [0.0, 1.0]), "product") == -math.inf
    assert (
        display_score(math.log(0.25), "product") == pytest.approx(0.25) and display_score(0.25, "min") == 0.25
    )


def test_unbounded_scores():
    node = chain((0,), [-3.0, 7.5])
    assert [path_score(node, rule) for rule in ("min", "mean", "last")] == [-3.0, 2.25, 7.5]
    with pytest.raises(ValueError, match=r'aggregate="product" needs step scores in \[0, 1\], got -3'):
        path_score(node, "product")
    with pytest.raises(
        ValueError, match=r'vote="weighted" needs scores in \[0, 1\], got -3; use vote="softmax"'
    ):
        elect([node], "min", "weighted")
    nodes = [chain((0,), [800.0], "1"), chain((1,), [801.0], "2"), chain((2,), [800.0], "1")]
    assert elect(nodes, "last", "softmax").answer == "2"  # 2 exp(-1) < 1, without overflow


def test_scores_that_cannot_be_used():
    with pytest.raises(ValueError, match="step 2 of path .* has no score; attach a verifier"):
        path_score(chain((0,), [0.5, None]), "min")
    with pytest.raises(ValueError, match="scored NaN; the verifier is broken"):
        path_score(chain((0,), [math.nan]), "min")
    with pytest.raises(ValueError, match="aggregate must be one of product, min, mean, last, got None"):
        path_score(chain((0,), [0.5]), None)


def test_a_step_without_text_does_not_count():
    node = chain((0,), [0.9])
    end = SearchNode(node, (0, 0), "", 1, None, True, "eos")
    assert path_score(end, "min") == 0.9
    assert path_score(SearchNode(SearchNode(), (0,), "", 1, None, True, "eos"), "min") == -math.inf


def test_ranked_breaks_ties_by_path_key():
    nodes = [chain(key, [0.5]) for key in ((2,), (0,), (10,), (1,))]
    assert [n.path_key for n in ranked(nodes, "min")] == [(0,), (1,), (2,), (10,)]


def test_votes_are_ordered_and_ties_deterministic():
    nodes = [chain((i,), [0.5], a) for i, a in enumerate("baab")]
    for order in (nodes, nodes[::-1]):
        found = elect(order, "min", "weighted")
        assert (found.answer, found.best.path_key, found.votes) == ("b", (0,), {"b": 1.0, "a": 1.0})


def test_all_zero_weights_still_answer():
    nodes = [chain((i,), [0.0], a) for i, a in enumerate("ba")]
    assert [elect(nodes, "product", vote).answer for vote in ("weighted", "max", "majority")] == ["b"] * 3


def test_max_vote_shows_the_product_itself():
    assert elect([chain((0,), [0.5, 0.5])], "product", "max").votes == {"1": pytest.approx(0.25)}


def test_nobody_votes():
    assert elect([chain((0,), [0.5], reason="length")], "min", "max").answer is None
    assert elect([], "min", "max").num_voted == 0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n", 0, "n must be an integer >= 1, got 0"),
        ("n", -4, "n must be an integer >= 1, got -4"),
        ("n", 4.0, "n must be an integer >= 1, got 4.0"),
        ("n", True, "n must be an integer >= 1, got True"),
        ("width", 0, "width must be an integer >= 1, got 0"),
        ("max_steps", 0, "max_steps must be an integer >= 1"),
        ("temperature", -1, "temperature must be >= 0"),
        ("temperature", math.nan, "temperature must be >= 0"),
        ("top_k", -1, "top_k must be an integer >= 0"),
        ("top_p", 0, r"top_p must be in \(0, 1\], got 0"),
        ("min_p", 1.5, r"min_p must be in \[0, 1\], got 1.5"),
        ("seed", "x", "seed must be an integer, got 'x'"),
        ("aggregate", "sum", "aggregate must be one of product, min, mean, last, got 'sum'"),
        ("vote", "best", "vote must be one of max, weighted, softmax, majority, got 'best'"),
    ],
)
def test_budget_invalid(field, value, message):
    with pytest.raises(ValueError, match=message):
        Budget(**{"n": 4, field: value})


def test_survivors():
    assert Budget(16).survivors == 4 and Budget(4).survivors == 1
    with pytest.raises(ValueError, match="got 18; use n=16 or 20"):
        _ = Budget(18).survivors


def test_costs_add():
    a = Cost(ModelCost(1, 2, 3, 4, 5, 6.0), ModelCost(flops=1.0), 1.0, 2.0, 3.0, 4.0, 100)
    total = a + Cost(ModelCost(10), peak_kv_bytes=70)
    assert (
        total.policy == ModelCost(11, 2, 3, 4, 5, 6.0) and total.peak_kv_bytes == 100 and total.flops == 7.0
    )
    assert a.peak_kv_bytes == 100 and sum([a, a], Cost()).seconds_score == 6.0


def test_tree_walks():
    root = SearchNode()
    for i in (2, 0, 1):
        root.children.append(SearchNode(root, (i,), pruned=i == 1))
    root.children[1].children.append(SearchNode(root.children[1], (0, 0)))
    assert [n.path_key for n in walk(root)] == [(), (0,), (0, 0), (1,), (2,)]
    assert [n.path_key for n in kept_leaves(root)] == [(0, 0), (2,)]
    assert root.path() == [] and root.path_text() == ""


def test_problem_ids():
    assert Problem("a").id == Problem("a", "1").id != Problem("b").id and Problem("a", id="x").id == "x"
