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
    at = text.rfind(BOX)
    while at >= 0:
        end = box_end(text, at + len(BOX))
        if end is not None:
            return text[at + len(BOX) : end - 1].strip()
        at = text.rfind(BOX, 0, at)
    return None


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
_DROPPED = re.compile(
    r"\\(?:left|right|displaystyle|[!,;:>]|quad|qquad)(?![a-zA-Z])"
    r"|\\ |\$|~|\^\s*\{?\s*\\circ\s*\}?|\\%|%|\\\$"
)
_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|([^\s{}\\]))\s*(?:\{([^{}]*)\}|([^\s{}\\]))")
_THOUSANDS = re.compile(r"-?\d{1,3}(?:(?:,|\{,\})\d{3})+(?:\.\d+)?")
_PLAIN_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:/\d+)?")


def answer_key(answer: str) -> str:
    """A canonical form: answers with one key are the same answer.

    Removes LaTeX spacing, dollar and percent signs, degrees, `\\left`, `\\text{}` and a final full stop;
    writes every rational number as `p/q` in lowest terms (`0.50`, `\\frac12` and `1/2` are one). Anything
    else stays text: unequal keys may still be equal mathematically, which grading decides.
    """
    text = _WRAPPERS.sub(r"\1", answer.strip())
    text = _DROPPED.sub("", text).strip().rstrip(".").strip()
    text = re.sub(r"^\\?[a-zA-Z]\s*=\s*(?!=)", "", text)  # "x = 5" answers 5
    if _THOUSANDS.fullmatch(text):
        text = text.replace("{,}", "").replace(",", "")
    previous = None
    while previous != text:  # innermost fractions first
        previous = text
        text = _FRACTION.sub(_plain_fraction, text)
    text = re.sub(r"\s+", "", text)
    return _number_key(text) or text.lower()


def _plain_fraction(match: re.Match) -> str:
    top, bottom = match.group(1) or match.group(2) or "", match.group(3) or match.group(4) or ""
    top, bottom = (
        part if re.fullmatch(r"\w+", part) else f"({part})" for part in (top.strip(), bottom.strip())
    )
    top = f"-{top[2:-1]}" if re.fullmatch(r"\(-\w+\)", top) else top
    return f"{top}/{bottom}"


def _number_key(text: str) -> str | None:
    if not _PLAIN_NUMBER.fullmatch(text) or len(text) > 100:
        return None
    top, _, bottom = text.partition("/")
    if bottom and not int(bottom):
        return None
    return str(Fraction(top) / int(bottom or 1))
