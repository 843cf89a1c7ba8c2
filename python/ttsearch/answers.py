"""Final answers in text: where they are, and one canonical key for each, so that equal answers are grouped by
a lookup.

Grouping by key instead of comparing pairs symbolically costs no accuracy in published ports and is far
faster.
"""

from __future__ import annotations

import re
from fractions import Fraction

BOX = "\\boxed{"
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?|-?\.\d+")
_BRACES = re.compile(r"(\\+boxed\{)|\\.|[{}]", re.S)


def box_end(text: str, start: int) -> int | None:
    """Index just behind the brace that closes the one before `start`; `\\{` and `\\}` are text."""
    depth, i = 1, start
    while i < len(text):
        if text[i] == "\\":
            i += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        i += 1
        if depth == 0:
            return i
    return None


def extract_boxed(text: str) -> str | None:
    """Content of the last complete `\\boxed{...}`."""
    opened: list[tuple[bool, int]] = []  # braces still open: of a box?, and where its content starts
    last = None
    for brace in _BRACES.finditer(text):
        if brace[0] == "}":
            box, start = opened.pop() if opened else (False, 0)
            if box and (last is None or start > last[0]):
                last = start, brace.start()
        elif brace[0] == "{" or brace[1]:
            opened.append((bool(brace[1]), brace.end()))
    return None if last is None else text[last[0] : last[1]].strip()


def extract_answer(text: str) -> str | None:
    """The boxed answer; else what follows the last `####` (GSM8K); else the last number; else None."""
    boxed = extract_boxed(text)
    if boxed is not None:
        return boxed or None
    if "####" in text:
        return text.rsplit("####", 1)[1].strip().split("\n")[0].strip() or None
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


_WRAPPERS = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|textit)\s*\{([^{}]*)\}")
_SPACES = re.compile(r"(?:(?<!\\)\\[;:> ]|\\q?quad(?![a-zA-Z])|~|\s)+")
_DROPPED = re.compile(
    r"\\(?:left|right|displaystyle|degree)(?![a-zA-Z])|\\[,!%$]|[$%°]|\^\s*\{?\s*\\circ\s*\}?"
)
_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|([^\s{}\\]))\s*(?:\{([^{}]*)\}|([^\s{}\\]))")
_MIXED = re.compile(
    r"(?<![\w.,^/])(\d{1,50})\s*\\[dtc]?frac\s*(?:\{\s*(\d{1,50})\s*\}|(\d))\s*(?:\{\s*(\d{1,50})\s*\}|(\d))"
)
_STANDALONE = re.compile(r"(?<![\w.,^/)}])(?:(\d{1,50})\s+)?(\d{1,50})/(\d{1,50})(?![\w.(^/\\])")
_THOUSANDS = re.compile(r"-?\d{1,3}(?:(?:,|\{,\}| )\d{3})+(?:\.\d+)?")
_PLAIN_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:/\d+)?")


def answer_key(answer: str) -> str:
    """A canonical form: answers with one key are the same answer.

    Removes LaTeX spacing, dollar and percent signs, degrees, `\\left`, `\\text{}` and a final full stop;
    writes every rational number as `p/q` in lowest terms (`0.50`, `\\frac12` and `1/2` are one, and so are
    `1\\frac{1}{2}`, `1 1/2` and `3/2`). Anything else stays text: unequal keys may still be equal
    mathematically, which grading decides.
    """
    text = _WRAPPERS.sub(r"\1", answer.strip())
    text = _SPACES.sub(" ", _DROPPED.sub("", text)).strip().rstrip(".").strip()
    text = re.sub(r"^\\?[a-zA-Z]\s*=\s*(?!=)", "", text)  # "x = 5" answers 5
    if _THOUSANDS.fullmatch(text):
        text = re.sub(r"\{,\}|[, ]", "", text)
    text = re.sub(r"\\[a-zA-Z]+|[A-Z]+", lambda word: word[0] if word[0][0] == "\\" else word[0].lower(), text)
    text = _STANDALONE.sub(_one_fraction, _MIXED.sub(_one_fraction, text))
    text = re.sub(r"(?<!\d) | (?!\d)", "", text)  # "1 2" is not 12
    previous = None
    while previous != text:  # innermost fractions first
        previous = text
        text = _FRACTION.sub(_plain_fraction, text)
    return _number_key(text) or text


def _one_fraction(match: re.Match) -> str:
    """A mixed number, or a fraction that stands alone, as one `\\frac`."""
    parts = [int(part) for part in match.groups() if part]
    whole, top, bottom = parts if len(parts) == 3 else (0, *parts)
    return f"\\frac{{{whole * bottom + top}}}{{{bottom}}}" if bottom else match[0]


def _plain_fraction(match: re.Match) -> str:
    """`top/bottom`, in brackets where what is next to it would be read as part of it."""
    top, bottom = ((match[i] or match[i + 1] or "").strip() for i in (1, 3))
    top = top if re.fullmatch(r"-?\w+", top) else f"({top})"
    bottom = bottom if re.fullmatch(r"\d+|[a-zA-Z]", bottom) else f"({bottom})"
    before, after = match.string[: match.start()][-1:], match.string[match.end() :][:2]
    touched = re.match(r"[\w)}^/]", before) or re.match(r"[\w({^!]|\\[a-zA-Z]", after)
    return f"({top}/{bottom})" if touched else f"{top}/{bottom}"


def _number_key(text: str) -> str | None:
    if not _PLAIN_NUMBER.fullmatch(text) or len(text) > 100:
        return None
    top, _, bottom = text.partition("/")
    if bottom and not int(bottom):
        return None
    return str(Fraction(top) / int(bottom or 1))
