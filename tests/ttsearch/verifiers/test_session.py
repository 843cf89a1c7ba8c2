"""Verifier sessions: forks, refusals, cancelled calls, running path scores; against re-scoring by plain transformers."""

import asyncio
import math
import re
import shutil
import time

import pytest
import torch
from prm_models import PlainIn, build_prm, tokenizer_of, write_prm
from prm_reference import REFERENCES
from tiny_models import rewrite, write_tiny
from tiny_tokenizers import llama3, qwen
from ttsearch.protocols import Verifier, VerifierSession
from ttsearch.scoring import score_steps
from ttsearch.types import Scored
from ttsearch.verifiers import PrmFamily
from ttsearch.verifiers.session import load_verifier, result_name
from ttsearch.verifiers.thinkprm import ThinkPrm

PROBLEM = "what is 12 + 3?"
STEPS = ["step 1: 12 + 3", "so we get = 15\nthen", "therefore the answer is \\boxed{15}"]
CHOSEN = ["trl", "math-shepherd", "rlhflow-mistral", "skywork"]
JUDGE = PrmFamily(
    name="judge", layout="question", turns=(("user", "{problem}\n{solution}\nIs that so?"),), step="{step}\n",
    rows=("Yes", "No"), mix=(1.0, 0.0),
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: write_prm(tmp_path_factory.mktemp(name), name, seed=3) for name in CHOSEN}


@pytest.fixture(scope="module")
def verifier(folders):
    with load_verifier(folders["trl"], "trl", dtype="fp32", kv_bytes=1 << 26) as verifier:
        yield verifier


@pytest.fixture
def session(verifier):
    session = verifier.open(PROBLEM)
    yield session
    session.close()
    verifier.engine.forget_prompts()
    assert not verifier.engine.verifier_forest._live and verifier.engine.budget.used_bytes == 0


def test_protocols(verifier, session):
    assert isinstance(verifier, Verifier) and isinstance(session, VerifierSession)
    assert re.fullmatch(r"trl\d+ \(trl, [0-9a-f]{8}\)", verifier.name)


@pytest.mark.parametrize("family", CHOSEN)
def test_a_chain_grown_step_by_step_equals_plain_transformers(tmp_path, family):
    plain = PlainIn(build_prm(tmp_path, family, seed=3))

    async def grow(session):
        at, scores = session.root, []
        for step in STEPS:
            scored = await session.score(at, [step])
            scores += scored.scores
            at = scored.handle
        at_once = await session.score(session.root, STEPS)
        return scores, at_once.scores

    with load_verifier(tmp_path, family, dtype="fp32", kv_bytes=1 << 26) as verifier:
        scores, at_once = asyncio.run(grow(verifier.open(PROBLEM)))
    expected = REFERENCES[family](plain, tokenizer_of(family), PROBLEM, STEPS).scores.tolist()
    assert scores == pytest.approx(expected, abs=1e-5) and at_once == pytest.approx(expected, abs=1e-5)


def test_children_fork_at_once_and_share_their_chain(verifier, session):
    async def search():
        first = await session.score(session.root, STEPS[:1])
        pairs = await asyncio.gather(*(session.score(first.handle, [f"{i} {step}" for step in STEPS]) for i in range(4)))
        session.release([first.handle])
        return first, pairs

    first, pairs = asyncio.run(search())
    cost = session.cost()
    ids = {len(pair.handle.path.ids) for pair in pairs}
    root = len(session.root.path.ids)
    assert cost.tokens_prefilled == len(first.handle.path.ids) + sum(pair.computed for pair in pairs)
    assert [pair.kept for pair in pairs] == [len(first.handle.path.ids)] * 4 and first.kept == root
    assert cost.tokens_reused >= 3 * len(first.handle.path.ids) and cost.tokens_recomputed == 0 and cost.flops > 0
    assert len(ids) <= 2 and session.seconds > 0
    other = verifier.open(PROBLEM)
    alone = asyncio.run(other.score(other.root, [STEPS[0], *(f"2 {step}" for step in STEPS)]))
    assert first.scores + pairs[2].scores == pytest.approx(alone.scores, abs=1e-5)
    other.close()


def test_running_scores_follow_the_path(session):
    async def grow():
        first = await session.score(session.root, [STEPS[0], " \n"])
        return first, await session.score(first.handle, STEPS[1:])

    first, second = asyncio.run(grow())
    a, b, c = first.scores[0], *second.scores
    assert first.scores[1] is None and first.running.count == 1
    running = second.running
    assert (running.count, running.min, running.last) == (3, min(a, b, c), c)
    assert running.mean == pytest.approx((a + b + c) / 3) and running.product == pytest.approx(a * b * c)
    assert running.log_product == pytest.approx(math.log(a * b * c), abs=1e-6) and running.bounded


def test_text_without_anything_to_read_keeps_the_chain(session):
    async def grow():
        blank = await session.score(session.root, ["\n\n"])
        after = await session.score(blank.handle, STEPS[:1])
        plain = await session.score(session.root, STEPS[:1])
        session.release([blank.handle])
        return blank, after, plain

    blank, after, plain = asyncio.run(grow())
    assert blank.scores == [None] and blank.running.count == 0 and math.isnan(blank.running.last)
    assert after.scores == plain.scores


def test_too_long_is_refused_and_the_session_goes_on(verifier, session):
    limit = verifier.text.max_length
    refused = asyncio.run(session.score(session.root, ["so " * limit, "then"]))
    assert refused.handle is None and refused.scores == [None, None]
    assert f"this verifier reads at most {limit}" in refused.refused
    assert asyncio.run(session.score(session.root, STEPS)).refused is None
    with pytest.raises(ValueError, match=rf"the problem has \d+ verifier tokens, this verifier reads at most {limit}"):
        verifier.open("what? " * limit)


def test_bad_steps_are_errors(session):
    with pytest.raises(ValueError, match=r"steps must be a sequence of at least one step, got \[\]"):
        asyncio.run(session.score(session.root, []))
    with pytest.raises(ValueError, match="steps must be a sequence of at least one step, got 'abc'"):
        asyncio.run(session.score(session.root, "abc"))


def test_cancelled_calls_leave_nothing_behind(verifier):
    session = verifier.open(PROBLEM)

    async def cancel(pause):
        tasks = [asyncio.ensure_future(session.score(session.root, [f"{i}"] * 20)) for i in range(6)]
        await asyncio.sleep(pause)
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        session.release([scored.handle for scored in ended if isinstance(scored, Scored)])
        return await session.score(session.root, STEPS)

    for pause in (0, 0.002, 0.02):
        last = asyncio.run(cancel(pause))
        session.release([last.handle])
    forest = verifier.engine.verifier_forest
    deadline = time.monotonic() + 60
    while len(verifier.engine._commands.call(lambda: [n for n in forest._live if n.refs]).result(60)) > 1:
        assert time.monotonic() < deadline, "a job that was under way gives its node back when it is done"
    verifier.engine._commands.call(forest.check_integrity).result(60)
    session.close()
    session.close()
    verifier.engine.forget_prompts()
    assert not forest._live


def test_a_score_that_is_not_finite_is_an_error_of_that_call(tmp_path):
    folder = write_prm(tmp_path, "trl", seed=3)
    bad = tokenizer_of("trl").encode("Q", add_special_tokens=False)[-1]
    rewrite(folder, lambda tensors: tensors["model.embed_tokens.weight"][bad].fill_(float("nan")))
    with load_verifier(folder, "trl", dtype="fp32", kv_bytes=1 << 26) as verifier:
        session = verifier.open(PROBLEM)

        async def both():
            return await asyncio.gather(
                session.score(session.root, ["Q"]), session.score(session.root, STEPS), return_exceptions=True
            )

        broken, fine = asyncio.run(both())
        assert isinstance(broken, ValueError) and "not finite" in str(broken)
        assert all(0 <= score <= 1 for score in fine.scores)
        assert asyncio.run(session.score(fine.handle, STEPS)).scores


def test_a_score_is_that_of_the_step_when_it_was_the_last(tmp_path):
    """Llama 3 makes one token of a full stop and a blank line: behind "a." there is another token once "b" follows."""
    family = PrmFamily(
        name="mine", prompt="{problem}\n", between="\n\n", bos="tokenizer", rows=("+", "-"), mix=(1, 0), max_length=60
    )
    write_tiny(tmp_path, "llama", seed=4, vocab_size=len(llama3()))
    llama3().save_pretrained(tmp_path)
    steps = ["so 12.", " ", "we add 3.", "x", "it equals 15."]

    async def search(session):
        at, scores = session.root, []
        for step in steps:
            scored = await session.score(at, [step])
            at, scores = scored.handle, scores + scored.scores
        return scores

    with load_verifier(tmp_path, family, dtype="fp32", kv_bytes=1 << 26) as verifier:
        session = verifier.open(PROBLEM)
        assert len(verifier.text.extend(verifier.text.start(PROBLEM), steps).path.steps) == 1
        at_once = asyncio.run(session.score(session.root, steps))
        expected = asyncio.run(search(session))
        assert at_once.scores == [None if score is None else pytest.approx(score, abs=1e-6) for score in expected]
        assert expected[1] is None and at_once.handle.path.steps == tuple(steps)
        refused = asyncio.run(session.score(session.root, [*steps, "12 " * 60]))
        assert refused.handle is None and refused.scores == [None] * 6 and "reads at most 60" in refused.refused
        texts = [step for step in steps if step.strip()]
        ((alone,),) = score_steps([PROBLEM], [[texts]], verifier)
        beside, other = score_steps([PROBLEM], [[texts, [*texts[:2], "y."]]], verifier)[0]
        assert alone.scores == beside.scores and other.scores[:2] == alone.scores[:2]
        session.close()
        verifier.engine.forget_prompts()
        assert not verifier.engine.verifier_forest._live


@pytest.mark.parametrize("kv_bytes", [0, -1])
def test_kv_bytes_are_at_least_one(folders, kv_bytes):
    with pytest.raises(ValueError, match=f"kv_bytes must be >= 1, or None for 2 GiB, got {kv_bytes}"):
        load_verifier(folders["trl"], "trl", kv_bytes=kv_bytes)


def test_the_name_tells_verifiers_apart(folders, tmp_path):
    """Results of one are not taken for those of another."""
    again = tmp_path / folders["trl"].name
    shutil.copytree(folders["trl"], again)
    names = []
    for folder, options in (
        (folders["trl"], {}), (folders["trl"], {}), (again, {}), (folders["trl"], {"mix": (1, 0)}),
        (folders["trl"], {"dtype": "bf16"}), (folders["trl"], {"prompt": "Problem: {problem}"}), (folders["trl"], {"kv": "int8"}),
    ):  # fmt: skip
        with load_verifier(folder, "trl", **{"dtype": "fp32", "impl": "auto"} | options) as verifier:
            names.append(verifier.name)
    assert names[0] == names[1] and len(set(names)) == 6
    thought = [result_name("owner/m", ThinkPrm(samples=samples), "bf16", seed) for samples, seed in ((1, 0), (1, 1), (2, 0))]
    assert len(set(thought)) == 3 and all(name.startswith("owner/m (thinkprm, ") for name in thought)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    tokenizer = qwen()
    write_tiny(folder, "llama", seed=4, vocab_size=len(tokenizer), max_position_embeddings=512)
    tokenizer.save_pretrained(folder)
    with load_verifier(folder, JUDGE, dtype="fp32", kv_bytes=1 << 26) as verifier:
        yield folder, verifier


@torch.no_grad()
def test_a_question_behind_the_solution_rolls_back(judge):
    """Its steps are scored one by one; the chain above the question is kept, the question is read again."""
    from transformers import AutoModelForCausalLM

    folder, verifier = judge
    session = verifier.open(PROBLEM)
    at_once = asyncio.run(session.score(session.root, STEPS))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), qwen()
    yes, no = (tokenizer.encode(word, add_special_tokens=False)[-1] for word in ("Yes", "No"))
    for k in range(len(STEPS)):
        solution = "".join(f"{step}\n" for step in STEPS[: k + 1])
        turn = {"role": "user", "content": f"{PROBLEM}\n{solution}\nIs that so?"}
        text = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        logits = model(torch.tensor([tokenizer.encode(text, add_special_tokens=False)])).logits[0, -1]
        assert at_once.scores[k] == pytest.approx(float(logits[[yes, no]].softmax(0)[0]), abs=1e-5)
    question = len(tokenizer.encode("\nIs that so?<|im_end|>\n<|im_start|>assistant\n"))
    path = len(at_once.handle.path.ids)
    assert session.cost().tokens_prefilled <= path + 2 * (question + 2) and session.cost().tokens_recomputed == 0
    forest = verifier.engine.verifier_forest
    verifier.engine._commands.call(forest.check_integrity).result(60)
    session.close()
    verifier.engine.forget_prompts()
    assert not forest._live


def test_wrong_family_or_tokenizer(folders):
    with pytest.raises(ValueError, match="PRM family must be one of"):
        load_verifier(folders["trl"], "nobody")
    with pytest.raises(ValueError, match="qwen-math-prm"):
        load_verifier(folders["trl"], "qwen-math-prm")
    with pytest.raises(ValueError, match="dtype must be one of bf16, fp16, fp32, got 'int3'"):
        load_verifier(folders["trl"], dtype="int3")
