"""The text a PRM reads for a problem and its steps, and where in it each step ends."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .family import PrmFamily, Turns, fill

MARK = "@@ttsearch:steps@@"  # stands for what follows while a chat template is rendered
NUMBER = re.compile(r"step\s*\d+\s*[.:]\s*", re.IGNORECASE)
NO_BYTE = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # surrogates that stand for no undecoded byte, as U+DC80 to U+DCFF do


def clean(text: str) -> str:
    """Text with what is no UTF-8 replaced: fit for a tokenizer."""
    return NO_BYTE.sub("\ufffd", text).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class Renderer:
    """A family's layout with the chat template of a tokenizer."""

    def __init__(self, tokenizer, family: PrmFamily):
        self.tokenizer, self.family = tokenizer, family
        if family.layout != "text" and not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"PRM family {family.name!r} is rendered by the checkpoint's chat template, this tokenizer has none; load "
                "the tokenizer from the PRM's own checkpoint"
            )

    def pieces(self, step: str) -> list[str]:
        """What of a step gets a score: its text without outer white space, or every line of it; nothing if none is visible."""
        text = clean(step).strip()
        if self.family.lines == "keep":
            return [text] if text else []
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        return [" ".join(lines)] if self.family.lines == "join" and lines else lines

    def written(self, piece: str, number: int) -> str:
        """A piece as the family writes it; `number` counts from 1."""
        if "{n}" in self.family.step:
            piece = NUMBER.sub("", piece, count=1) if NUMBER.match(piece) else piece
        return fill(self.family.step, step=piece, n=str(number))

    def opening(self, problem: str) -> str:
        """The text before the first step."""
        family = self.family
        if family.layout == "text":
            return fill(family.prompt, problem=problem)
        if family.layout == "chat":
            return self._answered(turns(family.turns, problem=problem))
        held = turns(family.turns, problem=problem, step=MARK, solution=MARK)
        return self._chat(held, add_generation_prompt=True).rpartition(MARK)[0]

    def turn(self, problem: str, pieces: Sequence[str]) -> str:
        """Layout "chat" with the assistant's turn ended, without the white space that some templates put behind it."""
        family = self.family
        answer = family.between.join(self.written(piece, i) + family.suffix for i, piece in enumerate(pieces, 1))
        return self._chat([*turns(family.turns, problem=problem), {"role": "assistant", "content": answer}]).strip()

    def text(self, problem: str, pieces: Sequence[str], since: int = 0) -> tuple[str, list[int]]:
        """The whole text, and for every piece from number `since` on the length of the text up to where it is read.

        With layout "question" only the last piece is read.
        """
        family = self.family
        written = [self.written(piece, i + 1) for i, piece in enumerate(pieces)]
        if family.layout == "dialogue":
            return self._dialogue(problem, written, since)
        solution, ends = "", []
        for i, step in enumerate(written):
            solution += (family.between if i else "") + step + family.suffix
            ends.append(len(solution))
        if family.layout == "question":
            asked = turns(family.turns, problem=problem, solution=solution)
            text = self._chat(asked, add_generation_prompt=True) + family.closing
            return text, [len(text)]
        opening = self.opening(problem)
        return opening + solution, [len(opening) + end for end in ends[since:]]

    def _dialogue(self, problem: str, written: list[str], since: int) -> tuple[str, list[int]]:
        messages: list[dict[str, str]] = []
        text, ends = "", []
        for i, step in enumerate(written):
            messages += turns(self.family.next_turns if i else self.family.turns, problem=problem, step=step)
            if i >= since:
                longer = self._answered(messages)
                if ends and not longer.startswith(text + self.family.reply):
                    raise ValueError(
                        f"PRM family {self.family.name!r}: the chat template changes an earlier turn when a later one "
                        "follows; use the chat template of the PRM's own checkpoint"
                    )
                text = longer
                ends.append(len(text))
            messages.append({"role": "assistant", "content": self.family.reply})
        return text, ends

    def _answered(self, messages: list[dict[str, str]]) -> str:
        """Text up to where the assistant's answer to `messages` begins."""
        return self._chat([*messages, {"role": "assistant", "content": MARK}]).rpartition(MARK)[0]

    def _chat(self, messages: list[dict[str, str]], **options) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **dict(self.family.template_args), **options)


def turns(held: Turns, **values: str) -> list[dict[str, str]]:
    return [{"role": role, "content": fill(text, **values)} for role, text in held]
