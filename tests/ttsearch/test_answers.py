"""Extraction, canonical keys and grading."""

import time

import pytest
from ttsearch.answers import answer_key, extract_answer, extract_boxed
from ttsearch.grade import gold_answer, is_correct


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{3}", "3"),
        ("\\boxed{1} no, \\boxed{2}.", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{2} and \\boxed{3", "2"),
        ("48+24 = <<48+24=72>>72 clips.\n#### 72", "72"),
        ("#### 1,234\n", "1,234"),
        ("She has 1,234 left over 2 days: 17.50", "17.50"),
        ("It is -4.", "-4"),
        ("\\boxed{}", None),
        ("nothing here", None),
        ("", None),
    ],
)
def test_extract(text, answer):
    assert extract_answer(text) == answer


def test_unclosed_box_is_no_box():
    assert extract_boxed("\\boxed{3") is None


@pytest.mark.parametrize(
    "group",
    [
        ["1/2", "0.5", "0.50", ".5", "\\frac{1}{2}", "\\dfrac12", "\\frac{2}{4}", "$\\frac{1}{2}$", "0.5."],
        ["-1/2", "-\\frac{1}{2}", "\\frac{-1}{2}", "-0.5"],
        ["1000", "1,000", "1{,}000", "1000.0", "\\$1,000", "x = 1000", "1000\\text{ }"],
        ["90", "90^\\circ", "90^{\\circ}", "90\\%"],
        ["(3,\\frac{\\pi}{2})", "\\left( 3, \\frac{\\pi}{2} \\right)", "(3, \\dfrac{\\pi}{2})"],
        ["\\text{(C)}", "(C)", "(c)", "\\mathrm{(C)}"],
    ],
)
def test_equal_answers_share_a_key(group):
    assert len({answer_key(answer) for answer in group}) == 1, [answer_key(a) for a in group]


def test_different_answers_do_not():
    answers = ["1", "-1", "2", "1/2", "\\frac{2}{1}x", "(1,2)", "(2,1)", "12", "\\sqrt{2}", "x+1", "1/0"]
    assert len({answer_key(answer) for answer in answers}) == len(answers)


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("18", "She makes 9 * 2 = 18.\n#### 18", True),
        ("18.0", "#### 18", True),
        ("19", "18", False),
        (None, "18", False),
        ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}", True),
        ("x^2+2x+1", "(x+1)^2", True),
        ("x^2+2x+2", "(x+1)^2", False),
        ("{1,2}", "\\{2, 1\\}", True),
        ("\\frac{", "\\pi", False),
        ("27", "27.0", True),
    ],
)
def test_grade(answer, gold, right):
    assert is_correct(answer, gold) is right


def test_grading_ends_in_time_and_goes_on():
    start = time.perf_counter()
    assert not is_correct("9^{9^{9^{9}}}", "x + 1", time_limit_s=1.0)
    assert time.perf_counter() - start < 60
    assert is_correct("2x+2", "2(x+1)")


def test_grade_in_a_thread():
    import threading

    seen = []
    thread = threading.Thread(target=lambda: seen.append(is_correct("2x+2", "2(x+1)")))
    thread.start()
    thread.join()
    assert seen == [True]


def test_gold_answer_forms():
    assert [gold_answer(t) for t in ("a\n#### 5", "so $\\boxed{x}$.", " 7 ")] == ["5", "x", "7"]
