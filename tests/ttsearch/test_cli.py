"""The command line over a scripted backend."""

import io
import json
import os
import threading

import pytest
import torch
import ttsearch.backend
from rich.console import Console
from scripted import ScriptedBackend
from ttsearch.cli import DEMO_PROMPT, app
from ttsearch.demo import verifier_path
from ttsearch.show import progress_bar
from typer.testing import CliRunner

runner = CliRunner()


def script(key):
    score = 0.9 - 0.1 * (sum(key) % 4)
    return (
        (f"{len(key)}:1+1=2\n\n", score) if len(key) < 3 else (f"\\boxed{{{sum(key) % 2}}}", score, "boxed")
    )


@pytest.fixture
def backend(monkeypatch):
    backend = ScriptedBackend(script)
    backend.loaded = []

    def load(policy, verifier, **options):
        backend.loaded.append((policy, verifier, options))
        return backend

    monkeypatch.setattr(ttsearch.backend, "load_backend", load)
    return backend


def run(*args, code=0):
    result = runner.invoke(app, args)
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def test_solve_shows_tree_answer_and_one_line_of_cost(backend):
    output = run("solve", "1+1?", "--n", "8", "--kv-gib", "1", "--kv", "int8").stdout
    assert "1:1+1=2" in output and "Answer: " in output and "8 paths voted" in output
    assert output.rstrip().splitlines()[-1].count("tokens decoded") == 1 and "peak KV" in output
    unset = dict.fromkeys(("prm_family", "prm_reference", "prm_base", "prompt_style"))
    given = {"kv_gib": 1.0, "device": "cpu", "weights": "auto", "kv": "int8", "speculate": "sure"}
    assert backend.loaded == [(None, None, {**unset, **given})]


def test_a_form_of_kv_that_does_not_exist_is_said_so():
    assert "kv must be one of" in run("solve", "1+1?", "--kv", "int4", code=2).stderr.replace("\n", " ")


def test_a_device_that_is_not_there_is_said_so(tmp_path):
    """The real backend, up to the point where a GPU would be needed."""
    for device, reason in (("cuda", "no GPU is visible to torch"), ("tpu", 'device must be "cpu" or "cuda"')):
        if device == "cuda" and torch.cuda.is_available():
            continue
        assert reason in run("solve", "1+1?", "--device", device, code=2).stderr.replace("\n", " ")
        solutions = tmp_path / "s.jsonl"
        solutions.write_text('{"problem": "1+1?", "solutions": ["2"]}\n')
        args = ("score", str(solutions), "--verifier", str(verifier_path()), "--results", str(tmp_path / "r.jsonl"))
        assert reason in run(*args, "--device", device, code=2).stderr.replace("\n", " ")


def test_solve_json_is_one_document(backend):
    record = json.loads(run("solve", "1+1?", "--n", "4", "--json", "--strategy", "dvts").stdout)
    assert record["strategy"] == "dvts" and record["num_voted"] == 1 and record["budget"]["n"] == 4


def test_solve_options_reach_the_budget(backend):
    record = json.loads(run(
        "solve", "q", "--json", "--n", "6", "--width", "3", "--seed", "7", "--temperature", "0.5",
        "--aggregate", "min", "--vote", "max", "--max-tokens", "99", "--max-step-tokens", "33",
        "--max-steps", "5", "--top-k", "4", "--top-p", "0.9", "--min-p", "0.1",
    ).stdout)  # fmt: skip
    assert record["budget"] == dict(
        n=6, width=3, seed=7, temperature=0.5, aggregate="min", vote="max", max_tokens=99, max_step_tokens=33,
        max_steps=5, top_k=4, top_p=0.9, min_p=0.1,
    )  # fmt: skip


def test_solve_without_a_problem_takes_the_demo_one(backend):
    assert json.loads(run("solve", "--json").stdout)["prompt"] == DEMO_PROMPT


def test_solve_a_file(backend, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"problem": f"{i}?", "answer": "1"}) + "\n" for i in range(3)))
    assert len(json.loads(run("solve", "--problem-file", str(path), "--limit", "2", "--json").stdout)) == 2


def test_solve_plots(backend, tmp_path):
    pytest.importorskip("matplotlib")
    run("solve", "1+1?", "--plot", str(tmp_path / "tree.svg"))
    assert (tmp_path / "tree.svg").read_text().count("<svg") == 1


@pytest.mark.parametrize("name", ["absent/tree.svg", "tree.txt", "tree"])
def test_solve_says_before_the_search_that_it_cannot_plot(backend, tmp_path, name):
    pytest.importorskip("matplotlib")
    assert "the tree's file must" in " ".join(run("solve", "q", "--plot", str(tmp_path / name), code=2).stderr.split())
    assert not backend.loaded


def test_ctrl_c_before_the_first_step_draws_nothing(backend, tmp_path, sigint):
    pytest.importorskip("matplotlib")
    backend.options = {"pause_after": 0}
    interrupt_when_waiting(backend, sigint)
    shown = run("solve", "q", "--plot", str(tmp_path / "tree.svg"), code=130)
    assert "Answer: none" in shown.stdout and "no step is finished" in shown.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("as_json", [True, False])
def test_a_refused_problem_of_a_file_does_not_take_the_others_along(backend, tmp_path, monkeypatch, as_json):
    start = backend.open

    def open_(problem, budget):
        if problem.prompt == "1?":
            raise ValueError("prompt of 9000 tokens does not fit")
        return start(problem, budget)

    monkeypatch.setattr(backend, "open", open_)
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"problem": f"{i}?"}) + "\n" for i in range(3)))
    shown = run("solve", "--problem-file", str(path), *["--json"] * as_json, code=1)
    assert "prompt of 9000 tokens does not fit" in " ".join(shown.stderr.split())
    if as_json:
        records = json.loads(shown.stdout)
        assert [r.get("error") for r in records] == [None, "prompt of 9000 tokens does not fit", None]
        assert [r["prompt"] for r in records] == ["0?", "1?", "2?"] and records[2]["answer"]
    else:
        assert shown.stdout.count("Answer: ") == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["q", "--limit", "3"], "--limit takes the first problems of a file"),
        (["\udcff"], "prompt must be text that is UTF-8"),
        (["q", "--n", "6"], "n must be a multiple of width=4, got 6"),
        (["q", "--n", "0"], "n must be an integer >= 1, got 0"),
        (["q", "--strategy", "x"], "strategy must be one of"),
        (["q", "--aggregate", "x"], "aggregate must be one of product, min, mean, last, got 'x'"),
        (["q", "--vote", "x"], "vote must be one of"),
        (["q", "--problem-file", "f.jsonl"], "not both"),
        (["--problem-file", "absent.jsonl"], "'absent.jsonl' does not exist"),
        (["--policy", "m"], "pass a problem"),
    ],
)
def test_errors_are_one_line(backend, args, message):
    result = run("solve", *args, code=2)
    assert (
        message in " ".join(result.stderr.split()) and "Traceback" not in result.output and not result.stdout
    )


def test_an_engine_bug_keeps_its_traceback(backend):
    backend.options = {"fail_after": 0}
    assert isinstance(runner.invoke(app, ["solve", "q"]).exception, RuntimeError)


def interrupt_when_waiting(backend, sigint):
    def watch():
        while not any(policy.waiting.is_set() for policy in backend.opened):
            threading.Event().wait(0.01)
        os.kill(os.getpid(), sigint)

    threading.Thread(target=watch, daemon=True).start()


def test_ctrl_c_shows_what_is_finished(backend, sigint):
    backend.options = {"pause_after": 2}
    interrupt_when_waiting(backend, sigint)
    record = json.loads(run("solve", "q", "--json", code=130).stdout)
    assert record["interrupted"] and record["candidates"] and record["answer"] is None


def test_strategies(backend):
    assert [s["name"] for s in json.loads(run("strategies", "--json").stdout)] == [
        "greedy", "majority", "best_of_n", "beam_search", "dvts"
    ]  # fmt: skip
    assert "beam_search" in run("strategies").stdout


def test_evaluate_and_compare(backend, tmp_path):
    path, folder = tmp_path / "p.jsonl", tmp_path / "out"
    path.write_text("".join(json.dumps({"problem": f"{i}?", "answer": str(i % 2)}) + "\n" for i in range(6)))
    args = ["evaluate", str(path), "--results", str(folder), "--n", "4", "--n", "8"]
    args += ["--strategy", "greedy", "--strategy", "beam_search", "--json"]
    rows = json.loads(run(*args).stdout)
    assert [(r["strategy"], r["n"]) for r in rows] == [("greedy", 1), ("beam_search", 4), ("beam_search", 8)]
    assert all(r["problems"] == 6 and r["low"] < r["accuracy"] < r["high"] for r in rows)
    opened = len(backend.opened)
    assert json.loads(run(*args).stdout) == rows and len(backend.opened) == opened, "a second run only reads"
    files = [str(folder / name) for name in ("greedy.jsonl", "beam_search-n8.jsonl")]
    assert json.loads(run("compare", *files, "--json").stdout)["problems"] == 6
    assert "points" in run("compare", *files).stdout


def problem_file(tmp_path, count=2):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"problem": f"{i}?", "answer": "1"}) + "\n" for i in range(count)))
    return str(path)


@pytest.mark.parametrize("width", [80, 200])
def test_evaluate_shows_every_name_and_digit(backend, tmp_path, monkeypatch, width):
    monkeypatch.setattr("ttsearch.cli.out", Console(width=width))
    command = ("evaluate", problem_file(tmp_path), "--results", str(tmp_path / "out"), "--strategy", "beam_search")
    shown = run(*command, "--n", "256").stdout
    assert all(word in shown for word in ("beam_search", "256", "PRM tokens", "95 % interval", "seconds")) and "…" not in shown
    assert shown.startswith("| strategy | N |") == (width == 80)


def test_evaluate_says_what_the_first_error_is(backend, tmp_path, monkeypatch):
    def open_(problem, budget):
        raise ValueError("prompt of 9000 tokens does not fit")

    monkeypatch.setattr(backend, "open", open_)
    shown = run("evaluate", problem_file(tmp_path), "--results", str(tmp_path / "out"), "--strategy", "majority").stdout
    assert "majority N=16, the first problem without a result: prompt of 9000 tokens" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--n", "4", "--n", "6"], "n must be a multiple of width=4, got 6"),
        (["--n", "4", "--strategy", "greedy", "--strategy", "typo"], "strategy must be one of"),
    ],
)
def test_evaluate_runs_nothing_of_a_sweep_that_cannot_end(backend, tmp_path, args, message):
    result = run("evaluate", problem_file(tmp_path), "--results", str(tmp_path / "out"), *args, code=2)
    assert message in " ".join(result.stderr.split()) and not backend.opened


def test_evaluate_interrupted_before_anything_of_the_last_run(backend, tmp_path, sigint):
    start = backend.open

    def open_(problem, budget):
        backend.options = {"pause_after": 0} if budget.n > 1 else {}
        return start(problem, budget)

    backend.open = open_
    interrupt_when_waiting(backend, sigint)
    command = ("evaluate", problem_file(tmp_path), "--results", str(tmp_path / "out"), "--json")
    shown = run(*command, "--strategy", "greedy", "--strategy", "majority", code=130)
    assert [row["strategy"] for row in json.loads(shown.stdout)] == ["greedy"]


def test_evaluate_needs_answers(backend, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"problem": "a"}\n')
    result = run("evaluate", str(tmp_path / "p.jsonl"), "--results", str(tmp_path), code=2)
    assert "needs an answer for every problem; 1 have none" in " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def prm(tmp_path_factory):
    from prm_models import write_prm

    return write_prm(tmp_path_factory.mktemp("trl"), "trl", seed=3)


def test_score_writes_results_and_continues_them(prm, tmp_path):
    file, results = tmp_path / "s.jsonl", tmp_path / "out" / "r.jsonl"
    records = [
        {"problem": "1+1?", "solutions": ["so 2\n\nanswer 2", "so 2\n\nanswer 3"]},
        {"problem": "2+2?", "steps": ["so", "4"]},
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    command = ("score", str(file), "--verifier", str(prm), "--results", str(results), "--prm-family", "trl")
    shown = run(*command, "--kv-gib", "0.1", "--dtype", "fp32")
    assert "3 of 3 solutions" in shown.stderr and "tokens_reused" in shown.stdout
    written = [json.loads(line) for line in results.read_text().splitlines()]
    by_problem = {record["problem"]: record["solutions"] for record in written}
    assert [len(s["scores"]) for s in by_problem["1+1?"]] == [2, 2] and len(by_problem["2+2?"]) == 1
    assert all(0 <= score <= 1 for s in by_problem["1+1?"] for score in s["scores"])
    summary = json.loads(run(*command, "--kv-gib", "0.1", "--dtype", "fp32", "--json").stdout)
    assert summary["solutions"] == 3 and summary["steps"] == 6 and summary["results"] == str(results)
    assert [json.loads(line) for line in results.read_text().splitlines()] == written


def test_score_cuts_at_a_separator_and_says_what_it_could_not_score(prm, tmp_path):
    file = tmp_path / "s.jsonl"
    file.write_text(json.dumps({"problem": "1+1?", "solutions": ["so | 2", "so " * 2000]}) + "\n")
    command = ("score", str(file), "--verifier", str(prm), "--prm-family", "trl", "--kv-gib", "0.1")
    shown = run(*command, "--results", str(tmp_path / "r.jsonl"), "--separator", "|")
    assert "the first one without all its scores: the path has" in " ".join(shown.stdout.split())
    record = json.loads((tmp_path / "r.jsonl").read_text())
    assert record["solutions"][0]["steps"] == ["so", "2"]
    missing = run("score", str(tmp_path / "none.jsonl"), "--verifier", str(prm), "--results", "r.jsonl", code=2)
    assert "does not exist" in " ".join(missing.stderr.split())
    unknown = run(*command[:4], "--prm-family", "nobody", "--results", "r.jsonl", code=2)
    assert "PRM family must be one of" in " ".join(unknown.stderr.split())


def test_a_bar_for_each_thing_that_is_counted():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with progress_bar(console) as progress:
        for step in ((2, 4, "tokens"), (4, 4, "tokens"), (1, 3, "layers")):
            progress(*step)
    shown = console.file.getvalue()
    assert all(word in shown for word in ("tokens", "4/4", "layers", "1/3"))
    console.file = io.StringIO()
    with progress_bar(console, "solutions"):
        pass
    assert "solutions" in console.file.getvalue(), "shown before the first is done"
