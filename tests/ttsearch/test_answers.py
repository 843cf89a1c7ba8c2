"""Extraction, canonical keys and grading."""

import random
import time

import pytest
from ttsearch.answers import BOX, answer_key, box_end, extract_answer, extract_boxed
from ttsearch.grade import _worker, gold_answer, is_correct


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


def test_boxes_are_those_that_their_own_braces_close():
    def last_box(text):
        at = text.rfind(BOX)
        while at >= 0 and box_end(text, at + len(BOX)) is None:
            at = text.rfind(BOX, 0, at)
        return None if at < 0 else text[at + len(BOX) : box_end(text, at + len(BOX)) - 1].strip()

    rng, pieces = random.Random(0), [BOX, "{", "}", "\\", "a", "\\{", "\\}", "\n", "boxed{"]
    for _ in range(20_000):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 12)))
        assert extract_boxed(text) == last_box(text), text
    assert extract_answer(BOX * 300_000) is None, "in one pass: it would take an hour"


@pytest.mark.parametrize(
    "group",
    [
        ["1/2", "0.5", "0.50", ".5", "\\frac{1}{2}", "\\dfrac12", "\\frac{2}{4}", "$\\frac{1}{2}$", "0.5."],
        ["-1/2", "-\\frac{1}{2}", "\\frac{-1}{2}", "-0.5"],
        ["1000", "1,000", "1{,}000", "1000.0", "\\$1,000", "x = 1000", "1000\\text{ }"],
        ["90", "90^\\circ", "90^{\\circ}", "90\\%", "90°", "90\\degree", "90 \\degree"],
        ["3/2", "1\\frac{1}{2}", "1 \\frac{1}{2}", "1\\tfrac12", "1\\ \\frac{1}{2}", "1 1/2", "1.5", "$1 \\frac 1 2$"],
        ["-7/2", "-3\\frac{1}{2}", "-3 1/2", "-3.5"],
        ["\\frac{1}{2}x", "\\dfrac{1}{2} x", "\\frac12\\,x", "1/2 x"],
        ["3\\frac{x}{2}", "3 \\frac{x}{2}"],
        ["12\\,\\text{cm}", "12 cm", "12\\text{ cm}", "12~\\mathrm{cm}", "12 CM"],
        ["10000", "10,000", "10\\,000", "10 000", "10~000"],
        ["\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"],
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
    ("one", "other"),
    [
        ("7", "2\\frac{1}{3}"),
        ("11/2", "1 1/2"),
        ("12", "1 2"),
        ("12", "1 \\quad 2"),
        ("\\frac{1}{2}x", "\\frac{1}{2x}"),
        ("\\frac{a}{b}c", "\\frac{a}{bc}"),
        ("\\frac{1}{2}\\pi", "\\frac{1}{2\\pi}"),
        ("x^\\frac{1}{2}", "x^1/2"),
        ("\\frac{3}{2}^2", "3/2^2"),
        ("3\\frac{-1}{2}", "3-\\frac{1}{2}"),
        ("3/\\frac{1}{2}", "3/1/2"),
        ("\\Delta", "\\delta"),
        ("2\\Pi", "2\\pi"),
    ],
)
def test_what_only_looks_equal_has_two_keys(one, other):
    assert answer_key(one) != answer_key(other) and not is_correct(one, other) and not is_correct(other, one)


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
        ("\\frac{9}{5}", "1\\frac{4}{5}", True),
        ("137.5", "137 \\frac{1}{2}", True),
        ("\\frac{1}{2}x", "\\frac{x}{2}", True),
        ("50\\%", "0.5", True),
        ("0.5", "50%", True),
        ("50%", "50", True),
        ("50%", "0.6", False),
    ],
)
def test_grade(answer, gold, right):
    assert is_correct(answer, gold) is right


def test_grading_ends_in_time_and_goes_on():
    start = time.perf_counter()
    assert not is_correct("9^{9^{9^{9}}}", "x + 1", time_limit_s=1.0)
    assert time.perf_counter() - start < 60
    assert is_correct("2x+2", "2(x+1)")


def test_a_verdict_is_never_that_of_the_pair_before(monkeypatch):
    """Ctrl-C while the child is still at work."""
    pairs = [("x^2+1", "1+x^2"), ("\\sqrt{2}", "\\pi"), ("\\sqrt{2}", "\\pi"), ("2x+2", "2(x+1)")]
    right = [is_correct(*pair) for pair in pairs]
    assert right == [True, False, False, True]
    with monkeypatch.context() as patch:
        patch.setattr(_worker, "_read_line", interrupted)
        with pytest.raises(KeyboardInterrupt):
            is_correct("(x+1)^2", "x^2+2x+1")
    assert [is_correct(*pair) for pair in pairs] == right


def interrupted(limit_s):
    raise KeyboardInterrupt


def test_grade_in_a_thread():
    import threading

    seen = []
    thread = threading.Thread(target=lambda: seen.append(is_correct("2x+2", "2(x+1)")))
    thread.start()
    thread.join()
    assert seen == [True]


def test_gold_answer_forms():
    assert [gold_answer(t) for t in ("a\n#### 5", "so $\\boxed{x}$.", " 7 ")] == ["5", "x", "7"]
