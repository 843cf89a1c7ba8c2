"""A PRM family: everything that tells one published process reward model from another, as data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

PLACEHOLDER = re.compile(r"\{(problem|step|n|solution)\}")
Turns = tuple[tuple[str, str], ...]  # (role, text) of chat turns
LAYOUTS_WITH = {  # field -> the layouts that use it
    "prompt": ("text",),
    "turns": ("chat", "dialogue", "question"),
    "next_turns": ("dialogue",),
    "reply": ("dialogue",),
    "closing": ("question",),
    "template_args": ("chat", "dialogue", "question"),
    "suffix": ("text", "chat", "question"),
    "between": ("text", "chat", "question"),
}


def fill(text: str, **values: str) -> str:
    """Put values for {problem}, {step}, {n}, {solution}, in one pass: braces in a value (or elsewhere) stay as they are."""
    return PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), text)


@dataclass(frozen=True)
class PrmFamily:
    """What text a PRM reads, where its scores are, and how they are made of logits.

    The text has one of four layouts:

    * "text": `prompt`, then every step.
    * "chat": `turns` rendered by the checkpoint's own chat template, then every step within the assistant's turn.
    * "dialogue": every step is a user's turn (`turns` with the first step, `next_turns` with a later one), answered by the
      assistant with `reply`; a step is read at the last token before its reply, and earlier replies stay in the text.
    * "question": `turns` hold the {solution} so far, `closing` follows the opened assistant's turn; only the last step of a
      call is read, at the last token.

    A step is written as `step` with `suffix` behind it, and `between` in front of the next one. Texts may hold {problem},
    `step` {step} and {n} (its number, from 1; the step's own "Step 3:" then goes), `turns` {step} or {solution}.
    """

    name: str
    source: str = ""  # where the layout was read
    # text
    layout: Literal["text", "chat", "dialogue", "question"] = "text"
    prompt: str = "{problem}"
    strip_problem: bool = False  # outer white space of the problem goes
    turns: Turns = ()
    next_turns: Turns = ()
    reply: str = ""
    closing: str = ""
    template_args: Mapping[str, Any] = field(default_factory=dict)  # for the chat template, such as date_string
    step: str = "{step}"
    suffix: str = ""
    between: str = ""
    lines: Literal["keep", "join", "each"] = "keep"  # newlines in a step: kept / made spaces / every line is scored
    # tokens
    tokenise: Literal["step", "whole"] = "whole"  # prompt, step and suffix each alone / the whole text as one string
    bos: Literal["tokenizer", "if any", "required", "never"] = "never"
    # ^ in front: what the tokenizer puts there by itself / its bos_token if it has one / always / nothing
    suffix_tokens: int | None = None  # the suffix must be so many tokens of its own (leading spaces aside); None: any number
    read: Literal["suffix", "every token"] = "suffix"  # "every token": where each token of the turn is predicted, its end too
    read_offset: int = 0  # added to the read position, which is the last token of the suffix
    max_length: int | None = None  # tokens; None: the model's max_position_embeddings
    vocab: int | None = None  # size of the real tokenizer's vocabulary, added tokens aside: there, `ids` must hold
    ids: Mapping[str, int] = field(default_factory=dict)  # text -> id of its last token
    # head
    rows: tuple[str, ...] = ()  # texts whose last token's row of the language-model head is a label; (): a head of its own
    answers: tuple[tuple[str, ...], ...] = ()  # spellings of yes and of no: P(yes) among those that are one token each
    vocab_mean: bool = False  # the one label is the mean logit over the vocabulary
    squash: Literal["softmax", "sigmoid", "none"] = "softmax"
    mix: tuple[float, ...] = ()  # weights of the squashed labels in the score
    unbounded: bool = False  # scores are not probabilities
    scale: float = 1.0  # "every token": a score is scale * sum of (log p - log p of a reference model) over the turn so far
    # how to tell a checkpoint
    architectures: tuple[str, ...] = ("*ForCausalLM",)  # patterns
    weight: str | None = None  # a weight that the files must hold
    labels: int | None = None
    token: str | None = None  # a token that the tokenizer must have
    known_as: tuple[str, ...] = ()  # patterns of folder or hub names, in lower case between slashes
    by_name_only: bool = True  # False: `architectures`, `weight`, `labels`, `token` alone say enough

    def __post_init__(self):
        check_types(self)
        if not self.name:
            raise ValueError("a PRM family must have a name")
        where = f"PRM family {self.name!r}"
        for f in fields(self):
            layouts = LAYOUTS_WITH.get(f.name, (self.layout,))
            unset = f.default_factory() if f.default is MISSING and f.name in LAYOUTS_WITH else f.default
            if self.layout not in layouts and getattr(self, f.name) != unset:
                raise ValueError(f"{where}: {f.name} is of layout {' or '.join(map(repr, layouts))}, not {self.layout!r}")
        name, written = ("prompt", self.prompt) if self.layout == "text" else ("turns", texts(self.turns))
        self._need(where, name, written, "{problem}")
        if self.layout == "dialogue":
            self._need(where, "turns", written, "{step}")
            self._need(where, "next_turns", texts(self.next_turns), "{step}")
            if not self.reply:
                raise ValueError(f"{where}: layout 'dialogue' needs a reply, such as '+'")
        if self.layout == "question":
            self._need(where, "turns", written, "{solution}")
        self._need(where, "step", self.step, "{step}")
        if self.tokenise == "step" and self.layout in ("dialogue", "question"):
            raise ValueError(f"{where}: tokenise must be 'whole' with layout {self.layout!r}, got 'step'")
        if self.read == "every token" and (self.layout != "chat" or self.tokenise != "whole"):
            raise ValueError(f"{where}: read 'every token' needs layout 'chat' and tokenise 'whole'")
        if self.scale != 1 and self.read != "every token":
            raise ValueError(f"{where}: scale is of read 'every token', not {self.read!r}")
        heads = [name for name in ("rows", "answers", "vocab_mean", "mix") if getattr(self, name)]
        if self.read == "every token" and heads:
            raise ValueError(f"{where}: read 'every token' has no head; leave out {', '.join(heads)}")
        if self.answers and (len(self.answers) != 2 or heads != ["answers"] or self.squash != "softmax"):
            raise ValueError(
                f"{where}: answers must be two groups of spellings, without rows, vocab_mean, mix or squash, got {self.answers}"
            )
        if self.rows and self.vocab_mean:
            raise ValueError(f"{where}: rows and vocab_mean exclude each other, got rows {self.rows}")
        if self.rows and len(self.rows) != len(self.mix):
            raise ValueError(f"{where}: mix must have one number per row, got {self.mix} for rows {self.rows}")
        if len(set(self.rows)) != len(self.rows):
            raise ValueError(f"{where}: rows must be distinct, got {self.rows}")

    @staticmethod
    def _need(where: str, name: str, text: str, placeholder: str) -> None:
        if placeholder not in text:
            raise ValueError(f"{where}: {name} must hold {placeholder}, got {text!r}")


def texts(turns: Turns) -> str:
    return "\n".join(text for _, text in turns)


def check_types(family: Any) -> None:
    """Every field of a family as its annotation says; lists, as JSON has them, become tuples."""
    hints = get_type_hints(type(family))
    for f in fields(family):
        value, hint = getattr(family, f.name), hints[f.name]
        if get_origin(hint) is tuple and isinstance(value, list | tuple):
            value = tuple(tuple(v) if isinstance(v, list) else v for v in value)
            object.__setattr__(family, f.name, value)
        if not matches(value, hint):
            allowed = " or ".join(map(repr, get_args(hint))) if get_origin(hint) is Literal else describe(hint)
            raise ValueError(f"PRM family {family.name!r}: {f.name} must be {allowed}, got {value!r}")


def matches(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in args
    if origin is tuple:
        items = args[:1] * len(value) if isinstance(value, tuple) and args[-1] is ... else args
        return isinstance(value, tuple) and len(items) == len(value) and all(map(matches, value, items))
    if origin is Mapping or hint is Mapping:
        return isinstance(value, Mapping) and all(matches(k, args[0]) and matches(v, args[1]) for k, v in value.items())
    if origin is not None:  # int | None, str | None
        return any(matches(value, arg) for arg in args)
    if hint is Any:
        return True
    if isinstance(value, bool) and hint is not bool:
        return False
    return isinstance(value, (int, float) if hint is float else hint)


def describe(hint: Any) -> str:
    if isinstance(hint, type) and not get_args(hint):
        return hint.__name__
    return str(hint).replace("typing.", "").replace("collections.abc.", "")
