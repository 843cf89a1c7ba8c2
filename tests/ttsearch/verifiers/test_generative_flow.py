"""What ThinkPRM and GenPRM ask of a model, step by step, with a script in the model's place."""

import asyncio
import math

import pytest
from scripted_writer import ChatTokenizer, ScriptedWriter
from ttsearch.verifiers.genprm import GenPrm
from ttsearch.verifiers.thinkprm import ThinkPrm
from ttsearch.verifiers.written import sigmoid

TOKENIZER = ChatTokenizer()
ASKED = "Is the solution correct?"


def run(family, writer, steps, key=7):
    """Verdicts of the steps, one behind the other; nothing stays held but what the last state holds."""

    async def main():
        state, _, _ = family.start(TOKENIZER, "1+1?")
        verdicts = []
        for step in steps:
            before = state
            grown = await family.advance(writer, TOKENIZER, state, step, key)
            if grown is None:
                return state, None
            state, task = grown
            verdicts.append(await task)
            if before.held is not None:
                writer.release(before.held)
        if state.held is not None:
            writer.release(state.held)
        return state, verdicts

    result = asyncio.run(main())
    assert not writer.held
    return result


def test_thinkprm_asks_behind_a_critique_that_ended():
    seen = []

    def odds(text):
        seen.append(text)
        return 2.0

    writer = ScriptedWriter(lambda text, i: f"It holds. {ASKED} Of course", odds)
    _, [first, second] = run(ThinkPrm(decision_temperature=2.0), writer, ["## Step 1: two", "three"])
    prompt = (
        "<user>You are given a math problem and a proposed step-by-step solution:\n\n[Math Problem]\n\n1+1?\n\n"
        "[Solution]\n\nStep 1: two\nStep 2: three\n\nReview and critique each step in the proposed solution to determine "
        "whether each step is correct. If the solution is incomplete, only verify the provided steps.</user>"
        "<assistant>\nLet's verify step by step:"
    )
    assert writer.begun[1][0] == prompt
    assert writer.begun[1][1] == prompt.index("Step 2"), "the problem and the first step are shared"
    assert seen[1] == prompt + f"It holds. \n{ASKED} "
    assert first.score == second.score == sigmoid(1.0) and [v.text for v in first.verifications] == ["It holds. "]
    assert second.tokens == len(prompt) + len("It holds. ")


def test_thinkprm_averages_and_leaves_out_what_did_not_end():
    texts = ["right </think> and more", "x" * 50, f"wrong. {ASKED}", "ends by itself"]
    odds = {"r": 1.0, "w": -3.0, "e": 0.0}
    writer = ScriptedWriter(lambda text, i: texts[i], lambda text: odds[text.split("step by step:")[1][0]])
    _, [verdict] = run(ThinkPrm(samples=4, max_tokens=40), writer, ["a"])
    assert verdict.score == pytest.approx((sigmoid(1.0) + sigmoid(-3.0) + sigmoid(0.0)) / 3)
    assert verdict.failures == ["unfinished"] and verdict.verifications[1].text is None
    assert sorted(writer.written) == [(7, 0), (7, 1), (7, 2), (7, 3)]


def test_thinkprm_without_an_end_has_no_score():
    _, [verdict] = run(ThinkPrm(samples=2, max_tokens=5), ScriptedWriter(lambda *_: "x" * 9, lambda text: 9.0), ["a"])
    assert verdict.score is None and verdict.failures == ["unfinished", "unfinished"]


def test_thinkprm_stops_where_it_invents_a_step():
    asked = []
    writer = ScriptedWriter(lambda *_: "Step 1: fine. Step 2: fine. Step 3: I go on", lambda text: asked.append(text) or 0.0)
    _, verdicts = run(ThinkPrm(), writer, ["a", "b"])
    assert [v.verifications[0].text for v in verdicts] == ["Step 1: fine. ", "Step 1: fine. Step 2: fine. "]


def test_a_prompt_that_leaves_no_room_is_refused():
    for family in (ThinkPrm(), GenPrm()):
        _, verdicts = run(family, ScriptedWriter(lambda *_: "", lambda text: 0.0, limit=60), ["a"])
        assert verdicts is None


ANALYSIS, CODE = "fine.</analyze>\n", "print(2)\n```\n"
YES, NO = "<output>\n$\\boxed{Yes}$\n</output>\n", "\\boxed{No}$\n</output>\n"


def test_genprm_writes_an_analysis_and_code_and_reads_the_judgement():
    def script(text, i):
        return ANALYSIS if text.endswith("step by step: ") else CODE + YES

    asked = []
    writer = ScriptedWriter(script, lambda text: asked.append(text) or 1.5)
    state, verdicts = run(GenPrm(), writer, ["one", "two"])
    assert [v.score for v in verdicts] == [sigmoid(1.5)] * 2
    family = GenPrm()
    turn = family.analyze.replace("{n}", "1") + ANALYSIS + family.verify + CODE + YES
    system = f"<system>{family.system}</system>"
    first = f"{system}<user>1+1?\none</user><assistant>"
    assert asked[0] == first + turn[: turn.index("Yes")]
    second = f"{first}{turn}</assistant><user>two</user><assistant>" + turn.replace("Paragraph 1", "Paragraph 2")
    assert asked[1] == second[: second.rindex("Yes")]
    assert state.text == second and len(writer.begun) == 1, "the chat goes on behind its own tokens"


def test_genprm_without_code_is_led_to_the_judgement():
    script = lambda text, i: ANALYSIS if text.endswith("step by step: ") else "{No}$\n</output>\n"  # noqa: E731
    asked = []
    _, [verdict] = run(GenPrm(verify=""), ScriptedWriter(script, lambda text: asked.append(text) or -1.0), ["one"])
    assert verdict.score == sigmoid(-1.0)
    assert asked[0].endswith(ANALYSIS + "<output>\n**Judgement**: $\\boxed{")


def test_genprm_keeps_the_first_sample_that_ended():
    def script(text, i):
        if text.endswith("step by step: "):
            return ["<output>", "no end in sight", "x" * 3000, "third " + ANALYSIS, "fourth " + ANALYSIS][i]
        return YES if "fourth" in text else "no box</output>\n"

    writer = ScriptedWriter(script, lambda text: 0.0)
    state, [verdict] = run(GenPrm(samples=5), writer, ["one"])
    assert verdict.score == 0.5 and verdict.failures == ["no judgement", "no judgement", "unfinished", "no judgement"]
    assert "fourth" in state.text


def test_genprm_has_one_budget_for_both_parts():
    script = lambda text, i: ANALYSIS if text.endswith("step by step: ") else "y" * 90 + YES  # noqa: E731
    room = len(ANALYSIS) + 90 + len(YES)
    for budget, failures in ((room, []), (room - 1, ["unfinished"]), (len(ANALYSIS), ["unfinished"])):
        _, [verdict] = run(GenPrm(max_tokens=budget), ScriptedWriter(script, lambda text: 0.0), ["one"])
        assert verdict.failures == failures


def test_genprm_goes_on_without_a_turn_that_failed():
    script = lambda text, i: ANALYSIS if text.endswith("step by step: ") else "?</output>\n" if "two" not in text else YES  # noqa: E731
    writer = ScriptedWriter(script, lambda text: 0.0)
    state, verdicts = run(GenPrm(), writer, ["one", "two"])
    assert [v.score for v in verdicts] == [None, 0.5]
    assert state.messages[2] == {"role": "assistant", "content": ""} and len(writer.begun) == 2


def test_a_failing_model_is_an_error_not_a_score():
    def odds(text):
        raise ValueError("the model is broken")

    with pytest.raises(ValueError, match="the model is broken"):
        run(ThinkPrm(), ScriptedWriter(lambda *_: "</think>", odds), ["a"])


def test_sigmoid_is_stable():
    assert sigmoid(-800.0) == 0.0 and sigmoid(800.0) == 1.0 and sigmoid(-40.0) == pytest.approx(math.exp(-40.0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples": 0}, "samples of generative family 'thinkprm' must be an integer >= 1, got 0"),
        ({"choices": ("yes", "yes")}, "choices of generative family 'thinkprm' must be two texts"),
        ({"decision_temperature": 0.0}, "decision_temperature must be > 0, got 0.0"),
        ({"turn": "{problem}"}, "turn of generative family 'thinkprm' must hold {solution}"),
        ({"step": "a step"}, "step of generative family 'thinkprm' must hold {step}"),
        ({"temperature": -1.0}, "sampling needs .*temperature=-1.0"),
        ({"ends": "</think>"}, r"PRM family 'thinkprm': ends must be tuple\[str, ...\], got '</think>'"),
        ({"ends": ["</think>", ""]}, r"ends of generative family 'thinkprm' must be texts that are not empty, got"),
        ({"ends": [], "step_end": ""}, r"ends of generative family 'thinkprm' must be texts that are not empty, got \(\)"),
        ({"choices": "yn"}, r"choices must be tuple\[str, str\], got 'yn'"),
        ({"samples": True}, "samples must be int, got True"),
        ({"between": 3}, "between must be str, got 3"),
        ({"opening": None}, "opening must be str, got None"),
        ({"temperature": "0.6"}, "temperature must be float, got '0.6'"),
        ({"top_k": "20"}, "top_k must be int, got '20'"),
        ({"decision_temperature": "1"}, "decision_temperature must be float, got '1'"),
    ],
)
def test_invalid(fields, message):
    with pytest.raises(ValueError, match=message):
        ThinkPrm(**fields)


@pytest.mark.parametrize("name", ["analyze_end", "output_end"])
def test_a_draft_needs_an_end(name):
    assert ThinkPrm(ends=["</think>"]).ends == ("</think>",) and ThinkPrm(temperature=1).temperature == 1
    with pytest.raises(ValueError, match=f"{name} of generative family 'genprm' must not be empty"):
        GenPrm(**{name: ""})
