"""The synchronous entries over a scripted backend: loops, interruption, resume."""

import asyncio
import json
import os
import signal
import threading

import pytest
from scripted import ScriptedBackend
from ttsearch import Budget, Problem, SearchResult, search, solve, solve_many
from ttsearch.results import read_results

from ttskernels.errors import OutOfPagesError

RULES = {"aggregate": "product", "vote": "weighted"}


def script(key):
    score = 0.9 - 0.1 * (sum(key) % 4)
    return ("s\n\n", score) if len(key) < 3 else (f"\\boxed{{{sum(key) % 2}}}", score, "boxed")


@pytest.mark.parametrize("strategy", ["greedy", "majority", "best_of_n", "beam_search", "dvts"])
def test_solve(strategy):
    backend = ScriptedBackend(script)
    result = solve("1+1?", backend=backend, strategy=strategy, n=8)
    assert isinstance(result, SearchResult) and result.answer in ("0", "1") and not result.interrupted
    assert result.seconds > 0 and result.cost.policy.tokens_decoded > 0
    assert backend.opened[0].closed and not backend.opened[0].held
    record = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert record["answer"] == result.answer and len(record["candidates"]) == len(result.candidates)


def test_solve_inside_a_running_loop():
    async def notebook():
        return solve("1+1?", backend=ScriptedBackend(script), n=4)

    assert asyncio.run(notebook()).answer is not None


def test_solve_raises_what_the_strategy_raises_inside_a_running_loop():
    async def notebook():
        return solve("1+1?", backend=ScriptedBackend(script), n=6)

    with pytest.raises(ValueError, match="n must be a multiple of width=4, got 6"):
        asyncio.run(notebook())


def test_missing_verifier_is_refused_before_decoding():
    backend = ScriptedBackend(script, has_verifier=False)
    with pytest.raises(ValueError, match="strategy 'beam_search' needs a verifier; pass verifier=..."):
        solve("1+1?", backend=backend)
    assert not backend.opened
    assert solve("1+1?", backend=backend, strategy="majority", n=3).num_voted == 3


def test_unknown_strategy():
    with pytest.raises(ValueError, match="strategy must be one of greedy, .*, got 'best'"):
        solve("1+1?", backend=ScriptedBackend(script), strategy="best")


def interrupt_when_waiting(backend, unseen=False):
    """Send this process a Ctrl-C once the scripted engine hangs. `unseen`: in a way that wakes no blocking call, as one
    that comes just before the call does not.
    """

    def watch():
        while not (backend.opened and backend.opened[-1].waiting.is_set()):
            threading.Event().wait(0.01)
        if unseen:
            threading.Event().wait(0.05)  # now the main thread blocks
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        else:
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()


def early(key):  # one path of the first step is already finished
    return ("\\boxed{7}", 0.9, "boxed") if key == (1,) else ("s\n\n", 0.5)


@pytest.mark.parametrize("unseen", [False, True])
@pytest.mark.parametrize("inside_a_loop", [False, True])
@pytest.mark.parametrize("strategy", ["beam_search", "dvts"])
def test_ctrl_c_returns_what_is_finished(strategy, inside_a_loop, unseen, sigint):
    backend = ScriptedBackend(early, options={"pause_after": 2})
    interrupt_when_waiting(backend, unseen)

    async def notebook():
        return solve("1+1?", backend=backend, strategy=strategy, n=8, width=2)

    result = (
        asyncio.run(notebook())
        if inside_a_loop
        else solve("1+1?", backend=backend, strategy=strategy, n=8, width=2)
    )
    assert result.interrupted and result.answer == "7" and result.best.path_key == (1,)
    assert result.to_dict()["interrupted"] is True
    assert backend.opened[0].closed and not backend.opened[0].held


def test_ctrl_c_before_anything_is_finished(sigint):
    backend = ScriptedBackend(early, options={"pause_after": 0})
    interrupt_when_waiting(backend)
    result = solve("1+1?", backend=backend, n=4)
    assert result.interrupted and (result.answer, result.best, result.candidates) == (None, None, [])


def test_search_as_a_coroutine_is_cancelled_like_any_other():
    async def main():
        backend = ScriptedBackend(early, options={"pause_after": 1})
        task = asyncio.ensure_future(search(Problem("q"), backend, "beam_search", Budget(4, **RULES)))
        while not (backend.opened and backend.opened[0].waiting.is_set()):
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert backend.opened[0].closed and not backend.opened[0].held

    asyncio.run(main())


def test_progress_reports_at_the_end():
    seen = []
    solve("1+1?", backend=ScriptedBackend(script), n=4, progress=seen.append)
    assert (
        seen[-1].finished == 4 and seen[-1].alive == 0 and seen[-1].step == 3 and seen[-1].tokens_decoded > 0
    )


def test_a_callback_that_raises_leaves_no_session_open():
    def broken(progress):
        raise KeyError("callback")

    backend = ScriptedBackend(script)
    with pytest.raises(KeyError, match="callback"):
        solve("1+1?", backend=backend, n=4, progress=broken)
    assert backend.opened[0].closed


PROBLEMS = [Problem(f"{i}?", "1", id=f"p{i}") for i in range(6)]


def test_solve_many_writes_and_resumes(tmp_path):
    path, backend = tmp_path / "out" / "r.jsonl", ScriptedBackend(script)
    budget = Budget(4, **RULES)
    first = solve_many(PROBLEMS[:3], backend, "beam_search", budget, results=path)
    assert [r["id"] for r in first] == ["p0", "p1", "p2"] and all(
        isinstance(r["correct"], bool) for r in first
    )
    path.write_text(path.read_text() + '{"id": "p3", "cut sho')
    seen = []
    records = solve_many(
        PROBLEMS,
        backend,
        "beam_search",
        budget,
        results=path,
        concurrency=2,
        progress=lambda *p: seen.append(p[:2]),
    )
    assert [r["id"] for r in records] == [p.id for p in PROBLEMS] and len(backend.opened) == 6
    assert seen == [(4, 6), (5, 6), (6, 6)]
    assert sorted(r["id"] for r in read_results(path)) == [p.id for p in PROBLEMS]


def test_resume_refuses_another_budget(tmp_path):
    path, backend = tmp_path / "r.jsonl", ScriptedBackend(script)
    solve_many(PROBLEMS[:1], backend, "beam_search", Budget(4, **RULES), results=path)
    with pytest.raises(ValueError, match=r"holds results with n=4 \(now 8\); choose another results file, or continue it"):
        solve_many(PROBLEMS, backend, "beam_search", Budget(8, **RULES), results=path)
    with pytest.raises(ValueError, match=r"holds results with strategy='beam_search' \(now 'dvts'\); choose"):
        solve_many(PROBLEMS, backend, "dvts", Budget(4, **RULES), results=path)


def test_resume_refuses_another_backend(tmp_path):
    path, backend = tmp_path / "r.jsonl", ScriptedBackend(script)
    backend.settings = {"policy": "a", "verifier": "v (trl)", "weights": "auto"}
    (record,) = solve_many(PROBLEMS[:1], backend, "majority", Budget(2), results=path)
    assert record["backend"] == backend.settings
    backend.settings = backend.settings | {"verifier": "likelihood", "weights": "int8"}
    match = r"holds results with verifier='v \(trl\)' \(now 'likelihood'\), weights='auto' \(now 'int8'\); choose another"
    with pytest.raises(ValueError, match=match):
        solve_many(PROBLEMS, backend, "majority", Budget(2), results=path)
    with pytest.raises(ValueError, match=r"holds results with backend=\{.*\} \(now None\)"):
        solve_many(PROBLEMS, ScriptedBackend(script), "majority", Budget(2), results=path)
    assert len(backend.opened) == 1


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (Problem("7?", "1", id="p0"), r"prompt='0\?' \(now '7\?'\)"),
        (Problem("0?", "999", id="p0"), r"gold='1' \(now '999'\)"),
    ],
)
def test_resume_refuses_another_problem_of_the_same_id(tmp_path, other, difference):
    path, backend = tmp_path / "r.jsonl", ScriptedBackend(script)
    solve_many(PROBLEMS[:2], backend, "majority", Budget(2), results=path)
    with pytest.raises(ValueError, match=f"holds problem 'p0' with {difference}; choose another results file"):
        solve_many([other], backend, "majority", Budget(2), results=path)
    assert len(solve_many(PROBLEMS[1:3], backend, "majority", Budget(2), results=path)) == 2, "a part of the data is fine"


def test_resume_refuses_records_that_do_not_say_of_what_they_are(tmp_path):
    path = tmp_path / "r.jsonl"
    solve_many(PROBLEMS[:1], ScriptedBackend(script), "majority", Budget(2), results=path)
    record = json.loads(path.read_text())
    del record["backend"]
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match="does not say which problems and models its results are of.*; choose another"):
        solve_many(PROBLEMS, ScriptedBackend(script), "majority", Budget(2), results=path)


def test_line_ends_of_unicode_are_no_line_ends_of_the_file(tmp_path):
    path, backend = tmp_path / "r.jsonl", ScriptedBackend(script)
    problems = [Problem(f"1{end}+1?", "1", id=f"u{ord(end)}") for end in "\u2028\u2029\x85"]
    for _ in range(2):
        records = solve_many(problems, backend, "majority", Budget(2), results=path)
    assert [r["prompt"] for r in records] == [p.prompt for p in problems] and len(backend.opened) == 3
    assert len(read_results(path)) == 3


def test_concurrency_is_bounded_and_real():
    running, peak = 0, 0

    class Counting(ScriptedBackend):
        def open(self, problem, budget):
            nonlocal running, peak
            running += 1
            peak = max(peak, running)
            policy = super().open(problem, budget)
            close = policy.close

            def closed():
                nonlocal running
                running -= 1
                close()

            policy.close = closed
            return policy

    solve_many(PROBLEMS, Counting(script), "best_of_n", Budget(2, **RULES), concurrency=3)
    assert peak == 3 and running == 0


def test_results_do_not_depend_on_concurrency():
    def strip(record):
        return {k: v for k, v in record.items() if k != "seconds"}

    one, many = (
        solve_many(PROBLEMS, ScriptedBackend(script), "dvts", Budget(8, **RULES), concurrency=c)
        for c in (1, 6)
    )
    assert list(map(strip, one)) == list(map(strip, many))


@pytest.mark.parametrize("kind", [ValueError, OutOfPagesError])
def test_a_refused_problem_is_recorded_and_the_rest_go_on(kind):
    class Small(ScriptedBackend):
        def open(self, problem, budget):
            if problem.id == "p1":
                raise kind("prompt of 9000 tokens does not fit 4096")
            return super().open(problem, budget)

    records = solve_many(PROBLEMS[:3], Small(script), "majority", Budget(2))
    assert [r.get("error") for r in records] == [None, "prompt of 9000 tokens does not fit 4096", None]
    assert records[1]["correct"] is False


def test_a_problem_with_an_error_runs_again(tmp_path):
    class Small(ScriptedBackend):
        def open(self, problem, budget):
            raise ValueError("does not fit")

    path, backend = tmp_path / "r.jsonl", ScriptedBackend(script)
    assert "error" in solve_many(PROBLEMS[:1], Small(script), "majority", Budget(2), results=path)[0]
    for _ in range(2):
        (record,) = solve_many(PROBLEMS[:1], backend, "majority", Budget(2), results=path)
    assert "error" not in record and len(backend.opened) == 1, "once"
    assert read_results(path) == [record], "the last record counts"


def test_an_engine_failure_stops_the_run():
    backend = ScriptedBackend(script, options={"fail_after": 1})
    with pytest.raises(RuntimeError, match="the engine broke"):
        solve_many(PROBLEMS, backend, "beam_search", Budget(4, **RULES))
    assert all(policy.closed and not policy.held for policy in backend.opened)


def test_solve_many_after_ctrl_c_keeps_the_finished(tmp_path, sigint):
    class OneHangs(ScriptedBackend):
        def open(self, problem, budget):
            self.options = {"pause_after": 0} if problem.id == "p2" else {}
            return super().open(problem, budget)

    backend = OneHangs(script)
    interrupt_when_waiting(backend)
    path = tmp_path / "r.jsonl"
    records = solve_many(PROBLEMS[:3], backend, "majority", Budget(2), results=path, concurrency=1)
    assert [r["id"] for r in records] == ["p0", "p1"] == [r["id"] for r in read_results(path)]
    assert all(policy.closed for policy in backend.opened)


def test_solve_many_invalid():
    with pytest.raises(ValueError, match="problems must have distinct ids"):
        solve_many([PROBLEMS[0]] * 2, ScriptedBackend(script), "majority", Budget(2))
    with pytest.raises(ValueError, match="concurrency must be >= 1, got 0"):
        solve_many(PROBLEMS, ScriptedBackend(script), "majority", Budget(2), concurrency=0)
