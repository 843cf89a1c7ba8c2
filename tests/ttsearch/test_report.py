"""Intervals, comparison of runs, the terminal tree and the picture."""

import asyncio
import io

import pytest
from rich.console import Console
from scripted import ScriptedPolicy
from ttsearch import Budget, Problem
from ttsearch.plot import layout, plot_tree
from ttsearch.report import compare, markdown, summarise, wilson
from ttsearch.show import cost_line, progress_line, render_result
from ttsearch.strategies import get_strategy
from ttsearch.types import Cost, ModelCost


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilson(correct, total, low, high):
    """Values of Newcombe 1998, Statistics in Medicine 17, table I (81 of 263), and of the closed form."""
    assert wilson(correct, total) == pytest.approx((low, high), abs=1e-4)


def test_wilson_invalid():
    with pytest.raises(ValueError, match="got 3 of 2"):
        wilson(3, 2)


def record(i, correct, **more):
    cost = Cost(ModelCost(tokens_decoded=100), ModelCost(tokens_prefilled=50, flops=2e9), peak_kv_bytes=i)
    from ttsearch.record import cost_to_dict

    return {
        "id": str(i), "strategy": "dvts", "budget": {"n": 4}, "correct": correct, "cost": cost_to_dict(cost),
        "num_voted": 1, "seconds": 0.5, **more,
    }  # fmt: skip


def test_summary():
    summary = summarise([record(i, i < 3) for i in range(4)])
    assert (summary.correct, summary.accuracy, summary.tokens_decoded, summary.flops) == (3, 0.75, 100, 2e9)
    assert summary.low < 0.75 < summary.high and summary.peak_kv_bytes == 3
    refused = {"id": "x", "strategy": "dvts", "budget": {"n": 4}, "correct": False, "error": "too long"}
    spoiled = summarise([record(0, True), refused])
    assert (spoiled.errors, spoiled.first_error, summary.first_error) == (1, "too long", None)
    assert "| dvts | 4 | 4 | 75.0 % |" in markdown([summary])
    with pytest.raises(ValueError, match="1 records have no gold answer to grade by, the first is '5'"):
        summarise([{k: v for k, v in record(5, True).items() if k != "correct"}])


def test_compare_is_paired():
    a = [record(i, i % 2 == 0) for i in range(200)]
    b = [record(i, i % 2 == 0 or i < 40) for i in range(200)]  # b solves all of a's and 20 more
    found = compare(a, b)
    assert (found.problems, found.difference, found.only_a, found.only_b) == (200, 0.1, 0, 20)
    assert 0.05 < found.low < 0.1 < found.high < 0.15 and found.differs
    assert not compare(a, a).differs and compare(a, b) == found, "the seed fixes the interval"
    with pytest.raises(ValueError, match="share no graded problem"):
        compare(a[:1], b[1:2])


@pytest.mark.parametrize("name", ["prompt", "gold"])
def test_compare_refuses_different_problems_of_one_id(name):
    a, b = ([record(0, True, prompt="p", gold="1") | {name: value}] for value in ("x", "y"))
    with pytest.raises(ValueError, match=f"must be of the same problems, '0' has {name}='x' in the first and 'y' in the second"):
        compare(a, b)


def searched(name="beam_search", n=8, steps=3):
    def script(key):
        score = (1 + sum((i + 2) * k for i, k in enumerate(key)) % 7) / 8
        return ("[bold]1+1\n\n", score) if len(key) < steps else (f"\\boxed{{{key[0] % 2}}}", score, "boxed")

    budget = get_strategy(name).prepare(Budget(n, 4, aggregate="min", vote="weighted"))
    policy = ScriptedPolicy(script, budget)
    return asyncio.run(get_strategy(name).run(Problem("a [red] $1?"), policy, budget))


def shown(renderable):
    console = Console(file=io.StringIO(), width=120)
    console.print(renderable)
    return console.file.getvalue()


def test_tree_shows_every_step_of_a_small_search():
    text = shown(render_result(searched()))
    assert text.count("[bold]1+1") == 16 and "a [red] $1?" in text, "markup in the text is text"
    assert text.count("boxed") == 16 and "8 paths voted" in text and "more pruned" not in text


def test_large_tree_is_summed_up_around_the_best_path():
    result = searched(n=64, steps=6)
    text = shown(render_result(result))
    assert len(text.splitlines()) < 40 and "more pruned, best step" in text and "more kept" in text
    assert text.count("[bold]1+1") == 5


def test_cost_line():
    cost = Cost(
        ModelCost(tokens_decoded=1234, tokens_reused=10, flops=2e9),
        ModelCost(flops=5e8),
        peak_kv_bytes=3 << 20,
    )
    assert cost_line(cost, 0.5) == (
        "1,234 tokens decoded, 10 reused, 2.5 GFLOP (verifier 500 MFLOP), 0.50 s, peak KV 3 MiB"
    )


def test_progress_line():
    from ttsearch.run import Progress

    assert "step 2  3 growing  1 finished  500 tokens  250 tokens/s" in str(
        progress_line(Progress(None, 2.0, 2, 3, 1, 500))
    )


def test_layout_does_not_cross():
    result = searched()
    at = layout(result.root)
    heights = [at[leaf][1] for leaf in at if not leaf.children]
    assert len(set(heights)) == len(heights) and at[result.root][0] == 0
    for node, (x, _) in at.items():
        assert all(at[child][0] == x + 1 for child in node.children)


@pytest.mark.parametrize("ending", ["svg", "png"])
@pytest.mark.parametrize("strategy", ["beam_search", "majority", "greedy"])
def test_plot(tmp_path, ending, strategy):
    pytest.importorskip("matplotlib")
    path = plot_tree(searched(strategy), tmp_path / f"tree.{ending}")
    assert path.stat().st_size > 1000


def test_plot_of_nothing(tmp_path):
    pytest.importorskip("matplotlib")
    result = searched()
    result.root = None
    with pytest.raises(ValueError, match="needs a result with a tree"):
        plot_tree(result, tmp_path / "t.svg")


def test_plot_says_what_is_wrong_with_the_path(tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("tree", "tree.txt"):
        with pytest.raises(ValueError, match=rf"must end in .*\.png.*\.svg.*, got '.*{name}'"):
            plot_tree(searched(), tmp_path / name)
    with pytest.raises(ValueError, match="must be in a folder that exists, got .*; make .*absent first"):
        plot_tree(searched(), tmp_path / "absent" / "t.svg")
    assert not list(tmp_path.iterdir())
