"""`make gpu` is ready: every part runs through the interpreter at its smallest size; trees and rivals' inputs are right."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ttskernels.ops.silu_mul import silu_mul

BENCH = Path(__file__).parents[2] / "bench"
PARTS = ["tests", "attention", "decode", "prm", "linear", "tune"]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu_attention
    import gpu_measure
    import gpu_trees

    return SimpleNamespace(trees=gpu_trees, attention=gpu_attention, measure=gpu_measure)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run `make gpu` itself")
@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_dry_run(part, tmp_path):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if not (BENCH / f"gpu_{part}.py").exists():
        pytest.skip(f"bench/gpu_{part}.py is not there")
    command = [sys.executable, str(BENCH / "gpu.py"), part, "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-2000:]
    results = json.loads((tmp_path / f"gpu-{part}-dry-run.json").read_text())
    assert results["cases"] and results["device"].startswith("none")
    assert not any("failed" in row for row in results["cases"].values())
    assert (tmp_path / f"gpu-{part}-dry-run.md").read_text().count("\n|") == 2 + len(results["cases"])


def test_unfinished_cases_come_first_and_failures_are_kept(bench, tmp_path, capsys):
    ran = []

    def case(name):
        def run():
            ran.append(name)
            if name == "b":
                raise RuntimeError("broken")
            return {"value": 1.5, "tree": {}}

        return run

    def rows(minutes, commit="x"):
        return bench.measure.Rows(tmp_path / "r.json", {"commit": commit}, minutes, "Title")

    rows(1).run({name: case(name) for name in "ab"})
    late = rows(0)
    late.run({name: case(name) for name in "abc"})
    assert late.left_out == ["c", "b", "a"] and ran == ["a", "b"]
    again = rows(1)
    again.run({name: case(name) for name in "abc"})
    assert ran == ["a", "b", "c", "b", "a"] and again.failed == ["b"]
    assert again.done["b"] == {"failed": "RuntimeError: broken"}
    assert rows(1, commit="y").done == {}, "results of another commit do not count"
    rows(1, commit=None).run({"a": case("a")})
    assert rows(1, commit=None).done == {}, "nor do those of code that nobody knows"


def test_a_case_that_is_killed_comes_last_next_time(bench, tmp_path):
    """It leaves word before it begins; a row that an earlier run has made stays."""
    path, ran = tmp_path / "r.json", []

    def rows(commit="x"):
        return bench.measure.Rows(path, {"commit": commit}, 1, "Title")

    def killed():
        raise KeyboardInterrupt  # nothing after it runs

    def broken():
        raise RuntimeError

    cases = {"good": dict, "killed": killed, "broken": broken, "new": dict}
    with pytest.raises(KeyboardInterrupt):
        rows().run(cases)
    assert json.loads(path.read_text())["cases"] == {"good": {}, "killed": {"failed": "did not end"}}
    assert rows().unfinished_first(cases) == ["broken", "new", "killed", "good"]
    with pytest.raises(KeyboardInterrupt):
        rows().run(cases)
    assert rows().unfinished_first(cases) == ["broken", "killed", "good", "new"]
    for commit in ("y", None):
        assert rows(commit).done == {} and rows(commit).unfinished_first(cases)[-1] == "killed"
    rows().run({"killed": dict, "good": lambda: ran.append(json.loads(path.read_text())["cases"]["good"]) or {}})
    assert ran == [{}] and rows().failed == ["broken"] and not rows().late


def test_a_case_is_stopped_when_the_time_is_up(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.measure, "MARGIN_S", 0.05)

    def endless():
        while True:
            bench.measure.attempt(lambda: time.sleep(60))  # no rival's failure

    late = bench.measure.Rows(tmp_path / "r.json", {"commit": "x"}, 0.1 / 60, "Title")
    late.run({"endless": endless, "next": dict})
    assert late.left_out == ["next"] and late.done["endless"]["failed"].startswith("did not end in ")
    in_time = bench.measure.Rows(tmp_path / "r.json", {"commit": "x"}, 0.1 / 60, "Title")
    in_time.run({"next": dict})
    time.sleep(0.2)  # nothing is raised later


def test_what_a_step_of_the_tests_part_has_started_ends_with_it(bench, tmp_path, monkeypatch):
    import gpu_tests

    monkeypatch.setattr(gpu_tests, "LEAST_S", 0.5)
    rows = bench.measure.Rows(tmp_path / "r.json", {"commit": "x"}, 0, "Title")
    started = time.monotonic()
    child = tmp_path / "child"
    row = gpu_tests.step(rows, ["sh", "-c", f"sleep 61 & echo $! > {child}; wait"], dict(os.environ))
    assert row == {"failed": "did not end in 0 s; run it alone"} and time.monotonic() - started < 20
    stat = Path("/proc", child.read_text().strip(), "stat")
    assert not stat.exists() or stat.read_text().split()[2] in "ZX", "its child runs on"
    monkeypatch.setattr(gpu_tests, "LEAST_S", 20.0)
    row = gpu_tests.step(rows, ["sh", "-c", "echo said; echo wrong >&2; exit 3"], dict(os.environ))
    assert row["failed"] == "exit 3: said / wrong"


def test_without_git_there_is_no_commit(bench, monkeypatch):
    import gpu

    monkeypatch.setenv("PATH", "")
    assert gpu.head()["commit"] is None


def test_copies_exceed_the_second_level_cache(bench, monkeypatch):
    """On an H200: four times 60 MiB, if a quarter of the memory holds as much."""
    mib, known = 1 << 20, SimpleNamespace(L2_cache_size=60 << 20, total_memory=141 << 30)
    monkeypatch.setattr(bench.measure, "GPU", True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: known)
    assert [bench.measure.copies_for(n * mib) for n in (1, 7, 240, 60_000)] == [240, 35, 1, 1]
    assert bench.measure.copies_for(mib, held_bytes=1 << 30) == 35


def test_every_call_of_an_inner_layer_reads_weights_of_its_own(bench, monkeypatch):
    import gpu_prm

    step_score, seen = gpu_prm.step_score, set()

    def score(*args, inner_weight, impl, **heads):
        seen.add(inner_weight.data_ptr())
        return step_score(*args, inner_weight=inner_weight, impl="reference", **heads)

    monkeypatch.setattr(gpu_prm, "copies_for", lambda read_bytes, held_bytes: 3)
    monkeypatch.setattr(gpu_prm, "measure", lambda work, copies: [work(i) for i in range(copies)])
    monkeypatch.setattr(gpu_prm, "step_score", score)
    assert "failed" not in gpu_prm.head_case(20, 4, 64, 0, 48)
    assert len(seen) == 3


@pytest.mark.parametrize("gated", [False, True])
def test_products_are_judged_by_the_vendors_own_error(bench, monkeypatch, gated):
    """bf16 results above 8 are 0.0625 apart: a product that is right but for its last rounding passes, a wrong one does not."""
    import gpu_linear

    exact, wrong = gpu_linear.exact, 0.0
    monkeypatch.setattr(gpu_linear, "DTYPE", torch.bfloat16)
    monkeypatch.setattr(gpu_linear, "tiles", lambda *_: ["a tile"])
    monkeypatch.setattr(gpu_linear, "silu_mul", lambda *args, impl: silu_mul(*args, impl="reference"))
    monkeypatch.setattr(gpu_linear, "launch", lambda *args, tile: exact(*args).bfloat16()[None] + wrong)
    assert gpu_linear.case(64, 4864, 896, gated)["tried"] == 1
    wrong = 0.3
    with pytest.raises(RuntimeError, match="a tile differs from a float32 product by 0.3"):
        gpu_linear.case(64, 4864, 896, gated)


def test_published_trees(bench):
    t = bench.trees
    assert (len(t.FASTTREE), len(t.PAT)) == (15, 20)
    tree = t.of_text("1,4,16,512 1024,256,128,32")
    assert [len(level) for level in tree.levels] == [1, 4, 16, 512]
    assert {len(tree.slots(leaf)) for leaf in tree.leaves} == {1024 + 256 + 128 + 32}
    for text in t.FASTTREE + t.PAT:
        nodes = list(map(int, text.split()[0].split(",")))
        assert [len(level) for level in t.of_text(text).levels] == nodes


@pytest.mark.parametrize("strategy", ["beam", "dvts", "best_of_n"])
def test_search_trees(bench, strategy):
    from ttskernels.kv import HeadShape

    tree = bench.trees.search_tree(strategy, 16, 100, steps=4)
    assert len(tree.leaves) == 16 and len(tree.levels) == (2 if strategy == "best_of_n" else 5)
    paths = [tree.slots(leaf) for leaf in tree.leaves]
    assert all(len(set(path)) == len(path) for path in paths)
    heads = HeadShape(8, 2, 64, 64, 2)
    shared, flat = tree.plan(heads), tree.plan(heads, flat=True)
    assert shared.stats().flat_tokens == flat.stats().flat_tokens == sum(map(len, paths))
    assert shared.stats().unique_tokens == len(set().union(*paths))
    assert sorted(shared.row_pos) == sorted(flat.row_pos) == sorted(len(path) - 1 for path in paths)


class Cascade:
    """FlashInfer's wrapper, by dense attention: what it is given must mean the same tree."""

    def __init__(self, levels, workspace, layout):
        assert layout == "NHD" and workspace.dtype == torch.uint8
        self.levels = levels
        self._batch_prefill_wrappers = [SimpleNamespace(_backend="auto") for _ in range(levels)]

    def plan(self, rows, pages, ids, last, q_heads, kv_heads, dim, page_size, q_data_type):
        assert len(rows) == len(pages) == len(ids) == len(last) == self.levels
        assert all(level._backend == "fa2" for level in self._batch_prefill_wrappers)
        self.seen = [[] for _ in range(rows[0][-1])]
        for level in range(self.levels):
            for node in range(len(rows[level]) - 1):
                part = ids[level][pages[level][node] : pages[level][node + 1]].tolist()
                slots = [p * page_size + i for p in part for i in range(page_size)]
                slots = slots[: len(slots) - page_size + int(last[level][node])]
                for row in range(rows[level][node], rows[level][node + 1]):
                    self.seen[row] += slots

    def run(self, q, kv):
        k, v = (pool.flatten(0, 1) for pool in kv)
        out = [
            torch.nn.functional.scaled_dot_product_attention(
                q[row, :, None].float(), k[s].transpose(0, 1).float(), v[s].transpose(0, 1).float(), enable_gqa=True
            )[:, 0]
            for row, s in enumerate(self.seen)
        ]
        return torch.stack(out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: FlashInfer itself runs")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_rivals_get_the_same_tree(bench, monkeypatch):
    """SDPA, FlexAttention and the cascade all agree with the reference on a ragged search tree."""
    from ttskernels.kv import HeadShape
    from ttskernels.ops.tree_attention import tree_attention

    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(MultiLevelCascadeAttentionWrapper=Cascade))
    tree, a = bench.trees.search_tree("beam", 8, 37, steps=3), bench.attention
    q = torch.randn(1, len(tree.leaves), 4, 64, dtype=torch.float16)
    k, v = (torch.randn(1, tree.first_page[-1], 16, 2, 64, dtype=torch.float16) for _ in range(2))
    plan = tree.plan(HeadShape(4, 2, 64, 64, 2))
    expected = tree_attention(q[0], k[0], v[0], plan, impl="reference").float()
    for rival in (a.sdpa, a.flex_attention, lambda *args: a.flashinfer_cascade(*args, "fa2")):
        assert rival(tree, q, k, v, expected) == {}
        with pytest.raises(RuntimeError, match="its result differs from ours by"):
            rival(tree, q, k, v, expected + 0.1)


@pytest.mark.parametrize("in_turn, scattered", [(0, False), (8, True)])
def test_leaves_that_are_decoded_lie_on_consecutive_or_scattered_pages(bench, in_turn, scattered):
    pytest.importorskip("triton", reason="triton is not installed")
    import gpu_decode

    from ttskernels.kv import build_plan
    from ttskernels.kv.machines import gpu_machine
    from ttskernels.kv.plan_layout import PAGE_BREAKS

    model = gpu_decode.random_model(gpu_decode.TINY)
    forest, leaves = gpu_decode.grown(model, 3, 32, 70, in_turn)
    rows = [(leaf, len(leaf.ids) - 1, 1) for leaf in leaves]
    plan = build_plan(forest, rows, model.heads, machine=gpu_machine(model.heads))
    assert bool(plan.header[PAGE_BREAKS]) == scattered
    assert all(leaf.capacity >= 70 + gpu_decode.ITERATIONS for leaf in leaves)


def timed(us):
    return {"cold": {"median_us": us}, "warm": {"median_us": us / 2}}


@pytest.mark.parametrize("tree, flat, floor, goal, flat_goal", [
    (100.0, 98.0, 80.0, True, True), (100.0, 97.0, 79.0, False, False), (60.0, 90.0, 39.5, True, True),
    (60.0, 90.0, 38.5, False, True), (9.0, 9.0, 5.0, True, True), (9.5, 9.0, 5.0, False, False),
])  # fmt: skip
def test_goals_of_attention(bench, tree, flat, floor, goal, flat_goal):
    made = bench.attention.judge({"floor_us": floor, "tree": timed(tree), "flat": timed(flat)})
    assert (made["goal_met"], made["flat_goal_met"]) == (goal, flat_goal)


def test_goals_beside_flashinfer_and_of_decoding(bench):
    import gpu_decode

    two, three = (bench.trees.of_levels(levels) for levels in ([(1, 64), (4, 16)], [(1, 64), (2, 16), (4, 16)]))
    judge = bench.attention.judge_cascade
    assert judge(three, timed(10.0), timed(20.0)) == {"times_flashinfer": 2.0, "flashinfer_goal_met": True}
    assert judge(three, timed(10.0), timed(19.0)) == {"times_flashinfer": 1.9, "flashinfer_goal_met": False}
    assert judge(two, timed(10.0), timed(19.0)) == {"times_flashinfer": 1.9}
    assert judge(three, timed(10.0), "not installed") == judge(three, {}, {}) == {}
    assert gpu_decode.judge(64, 70.0) == {"goal_met": True} and gpu_decode.judge(64, 69.9) == {"goal_met": False}
    assert gpu_decode.judge(256, 69.9) == {}


def test_a_missing_or_broken_rival_says_why(bench):
    def broken():
        raise ModuleNotFoundError("No module named 'flashinfer'")

    assert bench.measure.attempt(broken) == "ModuleNotFoundError: No module named 'flashinfer'"
