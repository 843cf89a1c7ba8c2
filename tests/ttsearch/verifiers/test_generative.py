"""Generative verifiers on the engine: equal to plain transformers at temperature 0, the same in any company, no page left."""

import asyncio
import time

import pytest
import torch
from chat_models import chat_tokenizer, write_chat_model
from plain_generative import PlainWriter, genprm, thinkprm
from ttsearch.verifiers.generative import GenerativeVerifier, draft_ends
from ttsearch.verifiers.genprm import GenPrm
from ttsearch.verifiers.spelling import Spelling
from ttsearch.verifiers.thinkprm import ThinkPrm

from ttskernels.errors import OutOfPagesError

OFTEN = ["</think>", "Is the solution", " correct?", "}x", "}", "Yes", "No", "</analyze>\n", "</output>\n"]
PROBLEM, STEPS = "1+1?", ["two", "so 2", "done"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    made = {}
    for name, seed, factor in (("a", 5, 2.5), ("b", 6, 2.5), ("c", 6, 4.0)):
        folder = tmp_path_factory.mktemp(name)
        made[name] = folder, write_chat_model(folder, seed, **dict.fromkeys(OFTEN, factor))
    return made


def load(folder, family, **options):
    return GenerativeVerifier.load(folder, family, **({"dtype": torch.float32, "kv_bytes": 1 << 24} | options))


def score(verifier, problem, steps, cuts=()):
    """Scores of the steps, given at once or in several calls; nothing is left behind."""

    async def main():
        session = verifier.open(problem)
        at, scores, begin = session.root, [], 0
        for end in (*cuts, len(steps)):
            found = await session.score(at, steps[begin:end])
            assert found.refused is None
            if at is not session.root:
                session.release([at])
            at, begin = found.handle, end
            scores += found.scores
        session.release([at])
        return scores, session, found.running

    scores, session, running = asyncio.run(main())
    session.close()
    assert_clean(verifier)
    return scores, session, running


def assert_clean(verifier):
    engine = verifier.engine
    engine.policy_forest.check_integrity()
    assert not engine.policy_forest._live and engine.budget.used_bytes == 0


def assert_equal(scores, expected):
    assert [s is None for s in scores] == [e is None for e in expected] and any(expected)
    assert [s for s in scores if s is not None] == pytest.approx([e for e in expected if e is not None], abs=1e-5)


@pytest.mark.parametrize("name", ["a", "b"])
def test_thinkprm_equals_plain_transformers(checkpoints, name):
    folder, model = checkpoints[name]
    plain = PlainWriter(model, chat_tokenizer())
    expected = [thinkprm(plain, PROBLEM, STEPS[: k + 1], 60, 1.5) for k in range(3)]
    with load(folder, ThinkPrm(temperature=0.0, max_tokens=60, decision_temperature=1.5)) as verifier:
        scores, _, running = score(verifier, PROBLEM, STEPS)
        again, _, _ = score(verifier, PROBLEM, STEPS, cuts=(1, 2))
    assert_equal(scores, expected)
    assert again == scores and running.count == 3 - expected.count(None)
    assert running.last == pytest.approx(scores[-1] or running.last)


@pytest.mark.parametrize(("name", "verify"), [("a", True), ("a", False), ("b", False), ("c", True)])
def test_genprm_equals_plain_transformers(checkpoints, name, verify):
    folder, model = checkpoints[name]
    expected = genprm(PlainWriter(model, chat_tokenizer()), PROBLEM, STEPS[:2], 120, verify)
    family = GenPrm(temperature=0.0, max_tokens=120, **({} if verify else {"verify": ""}))
    with load(folder, family) as verifier:
        scores, session, running = score(verifier, PROBLEM, STEPS[:2])
        again, _, _ = score(verifier, PROBLEM, STEPS[:2], cuts=(1,))
        failures = dict(session.failures)
        assert verifier.failures.total() == 2 * session.failures.total()
        assert " (genprm, " in verifier.name
    assert_equal(scores, expected)
    assert sum(failures.values()) == expected.count(None) == 2 - running.count
    assert again == scores


@pytest.mark.parametrize("family", [ThinkPrm(samples=3, max_tokens=40), GenPrm(samples=3, max_tokens=60)])
def test_same_seed_same_scores_in_any_company(checkpoints, family, cpu_extension):
    """Alone, beside other problems, in two calls or one, and with hardly any memory."""
    folder, _ = checkpoints["b"]
    problems = [PROBLEM, "2+2?", "3+3?"]

    async def together(verifier):
        sessions = [verifier.open(problem) for problem in problems]
        found = await asyncio.gather(*(s.score(s.root, STEPS) for s in sessions))
        return [f.scores for f in found], sessions

    with load(folder, family) as verifier:
        alone = [score(verifier, problem, STEPS, cuts=(2,))[0] for problem in problems]
        scores, sessions = asyncio.run(together(verifier))
        peak = verifier.engine.budget.peak_bytes
        for session in sessions:
            session.close()
        assert_clean(verifier)
    assert scores == alone and any(s is not None for row in alone for s in row)
    for share in (3.0, 2.5, 2.0):  # the peak depends on how the problems met, and one branch has to fit
        with load(folder, family, kv_bytes=int(peak / share)) as tight:
            try:
                scores, sessions = asyncio.run(together(tight))
            except OutOfPagesError:
                continue
            recomputed = sum(s.cost().tokens_recomputed for s in sessions)
            break
    else:
        pytest.fail("half of what three problems took together does not hold one branch")
    assert scores == alone and recomputed > 0
    with load(folder, family, seed=1) as other:
        assert score(other, PROBLEM, STEPS)[0] != alone[0]


def test_a_prompt_is_computed_once_for_its_samples_and_shared_by_prefixes(checkpoints):
    folder, _ = checkpoints["b"]
    family = ThinkPrm(samples=4, max_tokens=40)
    with load(folder, family) as verifier:
        prompts = [verifier.tokenizer(family.prompt(verifier.tokenizer, PROBLEM, STEPS[: k + 1])).input_ids for k in range(3)]
        _, session, _ = score(verifier, PROBLEM, STEPS)
        cost = session.cost()
        asked = sum(each.text is not None for v in session.verdicts.values() for each in v.verifications)
        tokens = sum(verdict.tokens for verdict in session.verdicts.values())
    assert asked + session.failures.total() == 12
    pairs = zip(prompts, prompts[1:], strict=False)
    shared = [next(i for i, (a, b) in enumerate(zip(*pair, strict=False)) if a != b) for pair in pairs]
    prompt_tokens = len(prompts[0]) + len(prompts[1]) - shared[0] + len(prompts[2]) - shared[1]
    question = len("\n") + 2  # "Is the solution", " correct?"; and the last token of a draft, which decoding leaves to it
    assert prompt_tokens + asked * question <= cost.tokens_prefilled <= prompt_tokens + asked * (question + 1) + 2 * 2
    assert prompt_tokens <= tokens <= cost.tokens_prefilled + cost.tokens_decoded
    assert cost.tokens_reused >= sum(3 * len(prompt) for prompt in prompts), "three of four samples begin behind a stored prompt"


@pytest.mark.parametrize("family", [ThinkPrm(max_tokens=60), GenPrm(max_tokens=60)])
def test_what_is_no_utf8_is_replaced(checkpoints, family):
    folder, _ = checkpoints["a"]
    with load(folder, family) as verifier:
        broken = score(verifier, "1+1\ud83d?", ["two \udfff", "x"])
        assert broken[0] == score(verifier, "1+1\ufffd?", ["two \ufffd", "x"])[0] and broken[1].verdicts


def test_a_step_without_text_and_one_too_long(checkpoints):
    folder, _ = checkpoints["a"]
    with load(folder, ThinkPrm(temperature=0.0, max_tokens=60)) as verifier:

        async def main():
            session = verifier.open(PROBLEM)
            first = await session.score(session.root, ["two", " \n"])
            blank = await session.score(first.handle, ["\n\n"])
            long = await session.score(blank.handle, ["x" * 5000])
            with pytest.raises(ValueError, match="steps must be a sequence of at least one step"):
                await session.score(session.root, [])
            session.release([first.handle, blank.handle])
            session.close()
            return first, blank, long

        first, blank, long = asyncio.run(main())
        assert_clean(verifier)
    assert first.scores[0] is not None and first.scores[1] is None and blank.scores == [None]
    assert blank.running == first.running
    assert long.handle is None and long.scores == [None] and "the model allows 4096 tokens" in long.refused


@pytest.mark.parametrize("family", [ThinkPrm(samples=4, max_tokens=400), GenPrm(samples=4, max_tokens=400)])
@pytest.mark.parametrize("turns", [1, 5, 40])
def test_cancelled_in_the_middle_ends_clean(checkpoints, family, turns):
    folder, _ = checkpoints["b"]
    with load(folder, family) as verifier:
        runner, step = verifier.engine._policy, verifier.engine._policy.step
        runner.step = lambda: (time.sleep(0.01), step())[1]  # so that what is cancelled is not done

        async def main():
            session = verifier.open(PROBLEM)
            task = asyncio.ensure_future(session.score(session.root, STEPS))
            for _ in range(turns):
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            again = await session.score(session.root, ["two"])
            session.close()
            return again

        assert asyncio.run(main()).handle is not None
        assert_clean(verifier)


def test_what_cannot_write_is_refused(checkpoints, tmp_path):
    folder, _ = checkpoints["b"]
    with pytest.raises(ValueError, match="'correct' and 'wrong' must be one token each behind"):
        load(folder, ThinkPrm(choices=("correct", "wrong")))
    with pytest.raises(ValueError, match="has no chat template"):
        from ttsearch.demo import policy_path

        load(policy_path(), ThinkPrm())
    with pytest.raises(ValueError, match="stop texts must not overlap: 'no end' ends as 'end it' begins"):
        load(folder, ThinkPrm(ends=("no end", "end it")))


def test_a_tokenizer_that_puts_a_space_in_front_is_refused():
    from tiny_tokenizers import mistral

    with pytest.raises(ValueError, match="does not spell a piece of text as it is"):
        Spelling(mistral(), None)


def test_spelling_cuts_between_and_inside_tokens():
    tokenizer = chat_tokenizer()
    spelling = Spelling(tokenizer, None)
    ids = spelling.encode("ab</think>é")
    assert spelling.cut(ids, 2) == (2, "") and spelling.cut(ids, 5) == (2, "</t") and spelling.cut(ids, 0) == (0, "")
    ids = [*spelling.encode("ab"), tokenizer.eos_token_id, *spelling.encode("c")]
    assert spelling.cut(ids, 2) == (3, ""), "a token without text belongs to what is before it"


def test_stop_texts_that_are_special_tokens_are_known_by_their_id():
    tokenizer = chat_tokenizer()
    ends = draft_ends(tokenizer, [tokenizer.eos_token_id], ["<|user|>", "</think>"])
    assert ends == {tokenizer.eos_token_id: "", tokenizer.convert_tokens_to_ids("<|user|>"): "<|user|>"}
