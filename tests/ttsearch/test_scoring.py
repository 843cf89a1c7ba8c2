"""score_steps: shared prefixes, resume after a kill, refusals and failures that spoil one solution only."""

import asyncio
import json
import math
import random

import pytest
import ttsearch
from prm_models import PlainIn, build_prm, tokenizer_of, write_prm
from prm_reference import REFERENCES
from tiny_models import rewrite
from ttsearch.backend import load_verifier
from ttsearch.budget import Budget
from ttsearch.results import ResultsFile
from ttsearch.scoring import score_steps, summarise
from ttsearch.types import Problem

PROBLEM = "what is 12 + 3?"
WORDS = "step 1: equals 12 + 3 - 1 so we add the sum of answer get".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_prm(tmp_path_factory.mktemp("trl"), "trl", seed=3)


@pytest.fixture(scope="module")
def verifier(folder):
    with load_verifier(folder, "trl", dtype="fp32", kv_bytes=1 << 26) as verifier:
        yield verifier


def random_solutions(rng, count, pool=3):
    """Solutions that share beginnings."""
    texts = [" ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 8))) for _ in range(pool)]
    return [[rng.choice(texts) for _ in range(rng.randint(1, 6))] for _ in range(count)]


def reference(plain, problem, steps, family="trl"):
    return REFERENCES[family](plain, tokenizer_of(family), problem, steps).scores.tolist()


@pytest.mark.parametrize("family", ["trl", "rlhflow-mistral", "math-shepherd"])
def test_every_score_equals_plain_transformers(family, tmp_path):
    plain = PlainIn(build_prm(tmp_path, family, seed=5))
    solutions = random_solutions(random.Random(1), 9)
    (scored,) = score_steps([PROBLEM], [solutions], tmp_path, family=family, dtype="fp32", kv_bytes=1 << 26)
    for steps, result in zip(solutions, scored, strict=True):
        expected = reference(plain, PROBLEM, steps, family)
        assert result.scores == pytest.approx(expected, abs=1e-5)
        assert result.min == pytest.approx(min(expected), abs=1e-5) and result.last == result.scores[-1]
        assert result.mean == pytest.approx(sum(expected) / len(expected), abs=1e-5)
        assert result.product == pytest.approx(math.prod(expected), abs=1e-5)
        assert result.error is result.refused is None


def test_int8_pages_score_alike_in_any_memory(folder, verifier, cpu_extension):
    solutions = random_solutions(random.Random(4), 8)
    options = dict(family="trl", dtype="bf16", kv="int8")
    with load_verifier(folder, **options) as small:
        model = small.engine.verifier_model
        assert model.config.kv_form == "int8"
        pages = 16 * 8 * model.kv_bytes_per_token
        scored = score_steps([PROBLEM], [solutions], small)
    (tight,) = score_steps([PROBLEM], [solutions], folder, kv_bytes=pages + (1 << 16), concurrency=2, **options)
    (exact,) = score_steps([PROBLEM], [solutions], verifier)
    assert [s.scores for s in tight] == [s.scores for s in scored[0]]
    for ours, theirs in zip(tight, exact, strict=True):
        assert ours.scores == pytest.approx(theirs.scores, abs=0.05)


def test_a_common_prefix_is_computed_once(verifier):
    opened = []

    class Watched:
        name = verifier.name

        def open(self, problem):
            opened.append(verifier.open(problem))
            return opened[-1]

    verifier.engine.forget_prompts()
    solutions = random_solutions(random.Random(2), 12)
    texts = ["\n\n".join(steps) for steps in solutions]
    first, again = score_steps([PROBLEM, PROBLEM], [texts[:7], texts[7:]], Watched())  # one problem, given twice
    (session,) = opened
    each = [*first, *again]
    tokens = {}
    for steps in solutions:
        path = verifier.text.start(PROBLEM)
        for i in range(len(steps)):
            extension = verifier.text.extend(path, steps[i : i + 1])
            tokens[tuple(steps[: i + 1])] = len(extension.ids)
            path = extension.path
    problem = len(verifier.text.start(PROBLEM).ids)
    assert sum(result.tokens_computed for result in each) == problem + sum(tokens.values())
    assert session.cost().tokens_prefilled == problem + sum(tokens.values()) and session.cost().tokens_recomputed == 0
    for steps, result in zip(solutions, each, strict=True):
        length = problem + sum(tokens[tuple(steps[: i + 1])] for i in range(len(steps)))
        assert result.tokens_computed + result.tokens_reused == length
    assert each[0].tokens_reused == 0
    verifier.engine.forget_prompts()
    assert not verifier.engine.verifier_forest._live and verifier.engine.budget.used_bytes == 0


def test_a_small_kv_budget_changes_nothing(folder, verifier):
    problems = [f"what is {i}?" for i in range(6)]
    solutions = [random_solutions(random.Random(i), 8) for i in range(6)]
    expected = score_steps(problems, solutions, verifier)
    pages = 16 * 6 * verifier.engine.verifier_model.kv_bytes_per_token
    tight = score_steps(problems, solutions, folder, family="trl", dtype="fp32", kv_bytes=pages + (1 << 16), concurrency=6)
    assert tight == expected


def test_resume_after_a_kill_in_the_middle_of_a_line(verifier, tmp_path):
    file = tmp_path / "out" / "scores.jsonl"
    problems = [Problem(f"what is {i}?", id=f"p{i}") for i in range(4)]
    solutions = [random_solutions(random.Random(i), 3) for i in range(4)]
    seen = []
    whole = score_steps(problems, solutions, verifier, results=file, progress=lambda *counts: seen.append(counts))
    assert seen[0] == (0, 12) and seen[-1] == (12, 12) and seen == sorted(seen)
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 4
    file.write_text("".join(lines[:2]) + lines[2][:25])
    kept = {json.loads(line)["id"] for line in lines[:2]}
    opened = []

    class Watched:
        name = verifier.name

        def open(self, problem):
            opened.append(problem)
            return verifier.open(problem)

    assert score_steps(problems, solutions, Watched(), results=file) == whole
    assert sorted(opened) == sorted(p.prompt for p in problems if p.id not in kept)
    assert {json.loads(line)["id"] for line in file.read_text().splitlines()} == {p.id for p in problems}
    assert score_steps(problems, solutions, Watched(), results=file) == whole and len(opened) == 2
    with pytest.raises(ValueError, match="holds other solutions of problem p0"):
        score_steps(problems[:1], [[["another"]]], verifier, results=file)

    class Other(Watched):
        name = "another PRM"

    with pytest.raises(ValueError, match=r"was scored by .* \(trl, .*, now it is another PRM .*; choose another results file"):
        score_steps(problems, solutions, Other(), results=file)
    file.write_text('{"id": 1}\n')
    with pytest.raises(ValueError, match="line 1: no record of score_steps"):
        score_steps(problems, solutions, verifier, results=file)


def test_another_familys_results_are_refused(verifier, folder, tmp_path):
    file = tmp_path / "scores.jsonl"
    score_steps([PROBLEM], [[["so"]]], verifier, results=file)
    with pytest.raises(ValueError, match=r"line 1 was scored by trl\d+ \(trl, \w+\), now it is trl\d+ \(trl, \w+\) .the code is"):
        score_steps([PROBLEM], [[["so"]]], folder, family="trl", dtype="fp32", mix=(1, 0), results=file)
    old = json.loads(file.read_text())
    file.write_text(json.dumps(old | {"verifier": "trl (trl)"}) + "\n")  # as files were before they had a code
    with pytest.raises(ValueError, match=r"was scored by trl \(trl\), now it is .*; choose another results file"):
        score_steps([PROBLEM], [[["so"]]], verifier, results=file)


def test_problems_with_an_error_are_tried_again(verifier, folder, tmp_path):
    file, options = tmp_path / "scores.jsonl", dict(family="trl", dtype="fp32")
    ((failed,),) = score_steps([PROBLEM], [[["so"]]], folder, results=file, kv_bytes=100, **options)
    assert "raise kv_bytes" in failed.error
    fine = score_steps([PROBLEM], [[["so"]]], folder, results=file, kv_bytes=1 << 26, **options)
    assert fine[0][0].error is None and fine == score_steps([PROBLEM], [[["so"]]], verifier)
    assert score_steps([PROBLEM], [[["so"]]], folder, results=file, kv_bytes=100, **options) == fine, "the later line counts"


DATA = '{"problem": "1+1?", "solutions": ["2"]}'


@pytest.mark.parametrize(
    "content",
    [
        "a text of mine",
        DATA,
        f"{DATA}\n{DATA}",
        '{"id": "a", "problem": "1+1?", "solutions": ["2"]}',
        f'{DATA}\n{{"id": "a", "pro',
        'x\n{"id": "a", "pro',
        '[{"id": "a"}',
        "{\n",
    ],
)
def test_a_file_that_is_not_ours_is_left_as_it_is(verifier, tmp_path, content):
    file = tmp_path / "mine.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match="choose another results file|not JSON"):
        score_steps([PROBLEM], [[["so"]]], verifier, results=file)
    assert file.read_text() == content
    with pytest.raises(ValueError):
        ResultsFile(file, "beam_search", Budget(n=4))
    assert file.read_text() == content


def test_a_record_that_lost_its_newline_is_kept(verifier, tmp_path):
    file = tmp_path / "scores.jsonl"
    first = score_steps(["a?"], [[["so"]]], verifier, results=file)
    record = file.read_bytes()
    file.write_bytes(record.rstrip())
    score_steps([PROBLEM], [[["so"]]], verifier, results=file)
    assert file.read_bytes().startswith(record) and file.read_bytes().count(b"\n") == 2
    for cut in (b'{"i', record[:-20], '{"id": "é'.encode()[:-1]):
        file.write_bytes(record + cut)
        assert score_steps(["a?"], [[["so"]]], verifier, results=file) == first and file.read_bytes() == record


def test_a_lone_surrogate_spoils_nothing(verifier, tmp_path):
    file, solutions = tmp_path / "scores.jsonl", [["so\n\nx \ud83d", "so\n\nwe"]]
    scored = score_steps([PROBLEM], solutions, verifier, results=file)
    assert scored[0][0].scores == score_steps([PROBLEM], [["so\n\nx \ufffd"]], verifier)[0][0].scores
    assert score_steps([PROBLEM], solutions, verifier, results=file) == scored and len(file.read_text().splitlines()) == 1


def test_a_path_that_is_too_long_keeps_the_scores_that_fit(verifier, folder):
    limit = verifier.text.max_length
    long = ["12 " * (limit // 40) for _ in range(20)]
    (results,) = score_steps([PROBLEM], [[[*long], ["so", "we"], [*long[:2], "so"]]], verifier)
    refused, fine, short = results
    fitting = sum(score is not None for score in refused.scores)
    assert 2 < fitting < 20 and refused.scores[fitting:] == [None] * (20 - fitting)
    assert f"reads at most {limit}" in refused.refused and refused.min is refused.product is None
    assert refused.scores[:2] == short.scores[:2] and refused.tokens_computed + refused.tokens_reused <= limit
    assert fine.refused is short.refused is None and fine.mean is not None
    ((spoiled,), (good,)) = score_steps(["what " * limit, PROBLEM], [[["so"]], [["so"]]], verifier)
    assert "the problem has" in spoiled.error and spoiled.scores == [None] and good.error is None
    assert summarise([results]) | {"tokens_computed": 0, "tokens_reused": 0, "mean_score": 0} == {
        "problems": 1, "solutions": 3, "steps": fitting + 5, "mean_score": 0, "tokens_computed": 0, "tokens_reused": 0,
        "refused": 1, "errors": 0,
    }  # fmt: skip


def test_scores_that_are_not_finite_spoil_the_solutions_that_go_through_them(tmp_path):
    folder = write_prm(tmp_path, "trl", seed=3)
    bad = tokenizer_of("trl").encode("Q", add_special_tokens=False)[-1]
    rewrite(folder, lambda tensors: tensors["model.embed_tokens.weight"][bad].fill_(float("nan")))
    solutions = [["so", "Q"], ["so", "we"], ["Q"]]
    ((first, second, third),) = score_steps([PROBLEM], [solutions], folder, family="trl", dtype="fp32", kv_bytes=1 << 26)
    assert "not finite" in first.error and first.scores[0] is not None and first.scores[1] is None and first.last is None
    assert second.error is None and None not in second.scores
    assert "not finite" in third.error


def test_works_inside_a_running_loop(verifier):
    async def notebook():
        return score_steps([PROBLEM], [[["so"]]], verifier)

    assert asyncio.run(notebook()) == score_steps([PROBLEM], [[["so"]]], verifier)
    assert ttsearch.score_steps is score_steps


def test_bad_input(verifier):
    with pytest.raises(ValueError, match="must be lists of one length"):
        score_steps([PROBLEM], [], verifier)
    with pytest.raises(ValueError, match="must be lists of one length"):
        score_steps(PROBLEM, [["so"]], verifier)
    with pytest.raises(ValueError, match=r"solutions\[0\] must be a list of solutions, got a text"):
        score_steps([PROBLEM], ["so"], verifier)
    with pytest.raises(ValueError, match=r"solutions\[0\]\[1\] has no step"):
        score_steps([PROBLEM], [["so", []]], verifier)
    with pytest.raises(ValueError, match="concurrency must be >= 1"):
        score_steps([PROBLEM], [["so"]], verifier, concurrency=0)
    with pytest.raises(ValueError, match=r"solutions\[0\]\[0\] must be a text or a list of steps, got dict"):
        score_steps([PROBLEM], [[{"text": "so"}]], verifier)
    with pytest.raises(ValueError, match=r"family, seperator, nonsense: no such argument, .* is loaded already; leave it out"):
        score_steps([PROBLEM], [["so"]], verifier, seperator="\n", family="judge", nonsense=3)
    assert score_steps([PROBLEM], [[]], verifier) == [[]]
