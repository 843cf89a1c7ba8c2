"""Every strategy end to end on the local engine, with the shipped models and with a real one."""

import asyncio
from pathlib import Path

import pytest
from prm_models import write_prm
from ttsearch.backend import load_backend
from ttsearch.budget import Budget
from ttsearch.demo import policy_path, verifier_path
from ttsearch.policies.local import LocalBackend
from ttsearch.protocols import Verifier
from ttsearch.run import search
from ttsearch.scoring import score_steps
from ttsearch.solve import solve, solve_many
from ttsearch.tree import walk
from ttsearch.types import Problem

PROBLEMS = [Problem("2;a+57;b-49;c+8;d-7?"), Problem("53;a+19;b+14?"), Problem("7;a*8;b-19;c+45;d-60;e*3?")]
RULES = dict(aggregate="product", vote="weighted", temperature=1.0, max_tokens=160)
STRATEGIES = ["greedy", "majority", "best_of_n", "beam_search", "dvts"]
DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def backend():
    with LocalBackend.load(policy_path(), verifier_path()) as backend:
        yield backend


def tree(result):
    return {node.path_key: (node.text, node.finish_reason, node.step_score) for node in walk(result.root)}


def assert_clean(backend):
    engine = backend.engine
    engine.forget_prompts()
    assert not engine.policy_forest._live and not engine.verifier_forest._live and engine.budget.used_bytes == 0
    engine.policy_forest.check_integrity()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_same_seed_same_tree_and_no_page_left(backend, strategy):
    first = solve(PROBLEMS[0], backend=backend, strategy=strategy, n=8, **RULES)
    again = solve(PROBLEMS[0], backend=backend, strategy=strategy, n=8, **RULES)
    assert tree(first) == tree(again)
    assert first.answer == again.answer and first.candidates
    scored = strategy not in ("greedy", "majority")
    for path in first.candidates:
        assert all((score is not None) == scored for score in path.step_scores())
    assert_clean(backend)


@pytest.mark.parametrize(
    "strategy, kv", [("best_of_n", "auto"), ("beam_search", "auto"), ("dvts", "auto"), ("beam_search", "int8")]
)
def test_problems_compete_for_a_quarter_of_the_memory(strategy, kv, cpu_extension):
    """Same trees, tokens and scores, no deadlock, no page leaked."""
    problems = [Problem(f"{7 + i};a+5{i};b-2{i};c+1{i};d-{i + 2}?") for i in range(8)]
    budget = Budget(8, **RULES)
    with LocalBackend.load(policy_path(), verifier_path(), kv=kv) as backend:
        roomy = solve_many(problems, backend, strategy, budget, concurrency=8)
    peak = max(r["cost"]["peak_kv_bytes"] for r in roomy)
    with LocalBackend.load(policy_path(), verifier_path(), kv_bytes=peak // 4, kv=kv) as tight:
        forms = {model.config.kv_form for model in (tight.engine.policy_model, tight.engine.verifier_model)}
        assert kv == "auto" or forms == {kv}
        squeezed = solve_many(problems, tight, strategy, budget, concurrency=8)
        assert tight.engine.budget.peak_bytes <= peak // 4
        assert_clean(tight)
    drop = ("seconds", "cost")
    by_id = [{r["id"]: {k: v for k, v in r.items() if k not in drop} for r in records} for records in (roomy, squeezed)]
    assert by_id[0] == by_id[1]
    recomputed = sum(r["cost"][m]["tokens_recomputed"] for r in squeezed for m in ("policy", "verifier"))
    assert recomputed > 0


def test_prompt_is_computed_once_for_all_branches(backend):
    result = solve(PROBLEMS[2], backend=backend, strategy="best_of_n", n=16, **RULES)
    steps = [node for node in walk(result.root) if node.parent is not None]
    continued = sum(bool(node.children) for node in steps)
    # The prompt once, and the last token of every step that went on: its KV is computed when the next step begins.
    assert result.cost.policy.tokens_prefilled == result.root.num_tokens + continued
    assert result.cost.policy.tokens_decoded == sum(node.num_tokens for node in steps)
    assert result.cost.policy.tokens_recomputed == 0


@pytest.mark.parametrize("strategy", ["best_of_n", "beam_search", "dvts"])
def test_interrupted_in_the_middle_ends_clean_with_what_is_finished(backend, strategy):
    async def interrupt():
        budget = Budget(16, **RULES)
        task = asyncio.ensure_future(search(PROBLEMS[2], backend, strategy, budget, keep_partial=True))
        while backend.engine.budget.used_bytes == 0 and not task.done():
            await asyncio.sleep(0)
        await asyncio.sleep(0.03)
        task.cancel()
        return await task

    result = asyncio.run(interrupt())
    assert result.interrupted
    assert all(node.text and node.released for node in walk(result.root) if node.parent is not None)
    assert_clean(backend)


def test_reference_implementation_serves_too():
    """What a machine without a compiler runs."""
    with LocalBackend.load(policy_path(), verifier_path(), impl="reference", dtype="fp32") as backend:
        result = solve(PROBLEMS[1], backend=backend, strategy="beam_search", n=4, **RULES)
    assert result.candidates and all(s is not None for s in result.best.step_scores())


def test_bad_input_is_an_error_that_says_what_to_do(backend):
    with pytest.raises(ValueError, match="n must be a multiple of width=4, got 6"):
        solve(PROBLEMS[0], backend=backend, strategy="beam_search", n=6, **RULES)
    with pytest.raises(ValueError, match="n must be an integer >= 1, got 0"):
        solve(PROBLEMS[0], backend=backend, strategy="majority", n=0, **RULES)
    with pytest.raises(ValueError, match="the policy allows"):
        solve("1;a+1" + ";b+1" * 200 + "?", backend=backend, strategy="majority", n=4, **RULES)
    with pytest.raises(ValueError, match="cannot tell the PRM family"):
        load_backend(policy_path(), policy_path())
    with pytest.raises(ValueError, match="dtype must be one of bf16, fp16, fp32"):
        load_backend(policy_path(), dtype="int3")
    with pytest.raises(ValueError, match="tokenizer"):
        load_backend(policy_path(), verifier_path(), prm_family="skywork")


@pytest.mark.parametrize("family", ["math-shepherd", "rlhflow-mistral", "skywork"])
def test_any_family_scores_a_search_as_it_scores_each_path_alone(family, tmp_path):
    """Policy and verifier share an engine; whole-text families roll back below live branches."""
    folder = write_prm(tmp_path, family, seed=3)
    options = dict(dtype="fp32", kv_bytes=1 << 25)
    with LocalBackend.load(policy_path(), folder, prm_family=family, **options) as backend:
        assert isinstance(backend.verifier, Verifier)
        result = solve(PROBLEMS[0], backend=backend, strategy="beam_search", n=8, **RULES)
        assert result.cost.verifier.tokens_prefilled > 0 and result.cost.seconds_score > 0
        assert_clean(backend)
    steps = [[step.text for step in node.path()] for node in result.candidates]
    (alone,) = score_steps([PROBLEMS[0].prompt], [steps], folder, family=family, **options)
    for node, scored in zip(result.candidates, alone, strict=True):
        assert node.step_scores() == pytest.approx(scored.scores, abs=1e-5)
        assert node.running.mean == pytest.approx(scored.mean, abs=1e-5)


def test_a_node_that_was_not_scored_cannot_have_scored_children(backend):
    async def run():
        policy = backend.open(PROBLEMS[0], Budget(2, **RULES))
        try:
            (child,) = await policy.expand([policy.root], 1, score=False)
            assert child.step_score is None
            await policy.expand([child], 1)
        finally:
            policy.close()

    with pytest.raises(ValueError, match="was expanded with score=False"):
        asyncio.run(run())
    assert_clean(backend)


def test_a_node_given_twice_grows_twice_and_is_not_released_twice(backend):
    async def run():
        policy = backend.open(PROBLEMS[0], Budget(4, **RULES))
        try:
            (child,) = await policy.expand([policy.root], 1)
            keys = [node.path_key for node in await asyncio.wait_for(policy.expand([child, child], [2, 1]), 60)]
            with pytest.raises(ValueError, match=r"node \(0,\) was released before, or is the root"):
                policy.release([child, child])
            assert not child.released, "nothing has changed"
            policy.release([child])
            return keys
        finally:
            policy.close()

    assert asyncio.run(run()) == [(0, 0), (0, 1), (0, 2)]
    assert_clean(backend)


def test_results_say_of_which_models_they_are(backend, tmp_path):
    path, budget = tmp_path / "r.jsonl", Budget(2, **RULES)
    (record,) = solve_many(PROBLEMS[:1], backend, "best_of_n", budget, results=path)
    assert record["backend"] == backend.settings and record["backend"]["policy"] == str(policy_path().resolve())
    assert solve_many(PROBLEMS[:1], backend, "best_of_n", budget, results=path) == [record]
    with LocalBackend.load(policy_path(), "likelihood", impl="reference", dtype="fp32") as other:
        with pytest.raises(ValueError, match=r"verifier='.*\(.*\)' \(now 'likelihood'\).*, dtype='bf16' \(now 'fp32'\)"):
            solve_many(PROBLEMS[:1], other, "best_of_n", budget, results=path)


def test_memory_that_is_no_number_of_gib():
    for kv_gib in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"kv_gib must be a finite number > 0, got {kv_gib}"):
            load_backend(kv_gib=kv_gib)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["best_of_n", "beam_search", "dvts"])
def test_gsm8k_on_a_real_model(strategy, smollm2_backend):
    from ttsearch.data import load_problems

    file = DATA / "gsm8k.jsonl"
    if not file.exists():
        pytest.skip(f"no {file}")
    problems = list(load_problems(file, limit=2))
    budget = Budget(16, aggregate="mean", vote="weighted", temperature=0.7, max_tokens=40)
    for record in solve_many(problems, smollm2_backend, strategy, budget, concurrency=2):
        cost = record["cost"]["policy"]
        assert "error" not in record and cost["tokens_recomputed"] == 0
        assert record["num_voted"] >= 0 and cost["tokens_decoded"] > 100
        assert cost["tokens_prefilled"] < 400, "the prompt, once, and one token for each step that went on"
        assert cost["tokens_reused"] > 16 * 50, "sixteen branches start from one stored prompt"
    smollm2_backend.engine.forget_prompts()
    assert not smollm2_backend.engine.policy_forest._live


@pytest.fixture(scope="module")
def smollm2_backend():
    from smollm2 import model_folder

    with load_backend(model_folder(), "likelihood") as backend:
        yield backend
