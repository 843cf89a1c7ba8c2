"""A tokenizer as bytes: where in a run of tokens a text is, and which ids decide between two choices."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from ..tokens import token_bytes
from .render import clean
from .text import common


class Spelling:
    """A tokenizer whose tokens spell the text that they are made of.

    Raises:
        ValueError: the tokenizer changes text that it is handed in pieces (it puts a space in front).
    """

    def __init__(self, tokenizer, vocab: int):
        self.tokenizer = tokenizer
        self.bytes = token_bytes(tokenizer, vocab)
        if self.spell(self.encode("a\n")) != b"a\n":
            raise ValueError(
                "the tokenizer does not spell a piece of text as it is (it adds a space in front?), so a text cannot be "
                "continued in pieces; a generative verifier needs a byte-level tokenizer such as Qwen's or Llama 3's"
            )

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(clean(text), add_special_tokens=False).input_ids)

    def spell(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.bytes[i] for i in ids)

    def question(self, text: str, choices: tuple[str, str]) -> tuple[list[int], tuple[int, int]]:
        """Ids of `text`, as they are in front of either choice, and the two ids that decide between them.

        Raises:
            ValueError: a choice is not one token there.
        """
        yes, no = (self.encode(text + choice) for choice in choices)
        same = common(yes, no)
        if len(yes) != same + 1 or len(no) != same + 1:
            raise ValueError(
                f"{choices[0]!r} and {choices[1]!r} must be one token each behind {text!r}, got {yes[same:]} and "
                f"{no[same:]}; change the family's choices, or the white space in front of them"
            )
        return yes[:same], (yes[same], no[same])

    def cut(self, ids: Sequence[int], at: int) -> tuple[int, str]:
        """How many of `ids` lie within the first `at` bytes, and what is left of those bytes."""
        ends = list(accumulate(len(self.bytes[i]) for i in ids))
        count = sum(end <= at for end in ends)
        begin = ends[count - 1] if count else 0
        return count, self.spell(ids)[begin:at].decode("utf-8", "surrogateescape")
