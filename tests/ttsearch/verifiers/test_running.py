"""Running path scores equal the rules applied to all step scores."""

import math
import random

import pytest
from ttsearch.aggregate import AGGREGATES, path_score
from ttsearch.types import SearchNode
from ttsearch.verifiers.running import Running


def test_any_cut_into_calls_gives_the_same_bits():
    rng = random.Random(0)
    scores = [rng.random() for _ in range(40)]
    whole = Running().fold(scores).scores()
    for _ in range(5):
        running, at = Running(), 0
        while at < len(scores):
            n = rng.randint(1, 9)
            running, at = running.fold([*scores[at : at + n], None]), at + n
        assert running.scores() == whole
    assert whole.min == pytest.approx(min(scores)) and whole.log_product == pytest.approx(sum(map(math.log, scores)), 1e-6)


def test_children_do_not_disturb_their_parent():
    parent = Running().fold([0.5])
    assert parent.fold([0.25]).scores().min == 0.25 and parent.fold([1.0]).scores().last == 1.0
    assert parent.scores().count == 1 and parent.scores().last == 0.5


@pytest.mark.parametrize("rule", AGGREGATES)
def test_path_scores_by_running_numbers_equal_those_by_steps(rule):
    running, node = Running(), SearchNode()
    for i, score in enumerate((0.9, 0.4, 0.7)):
        running = running.fold([score])
        node = SearchNode(node, (*node.path_key, i), "x", step_score=score)
        by_steps = path_score(node, rule)
        node.running = running.scores()
        assert path_score(node, rule) == pytest.approx(by_steps, rel=1e-6)


def test_a_product_of_unbounded_scores_is_an_error_with_running_numbers_too():
    node = SearchNode(SearchNode(), (0,), "x", step_score=1.5, running=Running().fold([1.5]).scores())
    assert path_score(node, "mean") == 1.5
    with pytest.raises(ValueError, match="this verifier is unbounded"):
        path_score(node, "product")


def test_a_refused_path_scores_least_whatever_its_running_numbers():
    node = SearchNode(SearchNode(), (0,), "x", finish_reason="refused", running=Running().fold([0.5]).scores())
    assert path_score(node, "min") == -math.inf
