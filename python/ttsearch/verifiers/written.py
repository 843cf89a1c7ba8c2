"""What verifiers that write before they judge have in common, whatever they write.

A family says what is written and where the judgement is (thinkprm.py, genprm.py); a `Writer` writes it on our engine.
A verification that fails or does not end has no score and is counted: it is never taken for "incorrect".
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from ttskernels.engine.work import Sampling

from ..tree import together
from .family import check_types
from .writer import Chain, Thread, Writer

UNFINISHED, NO_JUDGEMENT = "unfinished", "no judgement"


@dataclass(frozen=True)
class GenerativeFamily:
    """What every generative family has. One verification is a draft; a step's score is the mean over `samples` of them.

    Args:
        known_as: patterns of folder or hub names, in lower case between slashes.
        choices: the texts of a good and a bad judgement, one token each behind `forced`.
        temperature, top_k, top_p: of the drafts. max_tokens: of one draft.
    """

    name: str = ""
    source: str = ""
    known_as: tuple[str, ...] = ()
    choices: tuple[str, str] = ("yes", "no")
    samples: int = 1
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int = 4096

    def __post_init__(self):
        check_types(self)
        for name in ("samples", "max_tokens"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} of generative family {self.name!r} must be an integer >= 1, got {value!r}")
        if self.choices[0] == self.choices[1]:
            raise ValueError(f"choices of generative family {self.name!r} must be two texts, got {self.choices!r}")
        _ = self.sampling

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)

    @property
    def forced(self) -> str:
        """Text in front of a choice."""
        raise NotImplementedError

    def stops(self, max_steps: int) -> tuple[str, ...]:
        """Every text that a draft may stop at."""
        raise NotImplementedError

    def start(self, tokenizer, problem: str) -> tuple[State, str, int]:
        """The state before the first step; a prompt, and how much of it every prompt of the problem begins with."""
        raise NotImplementedError

    async def advance(
        self, writer: Writer, tokenizer, state: State, step: str, key: int
    ) -> tuple[State, asyncio.Task[Verdict]] | None:
        """The state behind one more step, and its verdict, which may still be in the making. None: it is too long."""
        raise NotImplementedError


@dataclass(frozen=True)
class State:
    """What has been read: texts for the next prompt, and the KV it shares (`held`, given back by `Writer.release`)."""

    problem: str
    root: Chain | None = None  # what all prompts of the problem begin with; the session's own
    steps: tuple[str, ...] = ()
    held: Chain | Thread | None = None
    messages: tuple[dict[str, str], ...] = ()
    text: str = ""  # that `held` stands for, if it is a thread


@dataclass(frozen=True)
class Verification:
    """One draft that was judged, or the reason why it was not, in the words that are counted."""

    tokens: int  # that were computed for it, beyond the prompt
    score: float | None = None
    text: str | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Verdict:
    """Of a solution so far. `tokens`: computed for it, prompt and drafts."""

    verifications: tuple[Verification, ...]
    prompt_tokens: int

    @property
    def score(self) -> float | None:
        """The mean over the verifications that were judged; None if none was."""
        scores = [each.score for each in self.verifications if each.score is not None]
        return math.fsum(scores) / len(scores) if scores else None

    @property
    def failures(self) -> list[str]:
        return [each.failure for each in self.verifications if each.failure is not None]

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + sum(each.tokens for each in self.verifications)


async def verdict_of(prompt_tokens: int, verifications: Iterable[Coroutine[Any, Any, Verification]]) -> Verdict:
    """Run all at once. An error of one (a model that is broken, not a draft) is raised when all have ended."""
    return Verdict(tuple(await together(verifications)), prompt_tokens)


def render_chat(tokenizer, messages: Sequence[dict[str, str]]) -> str:
    """Messages in the checkpoint's chat template, up to where the assistant begins."""
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)


def shared_length(text: str, longer: str) -> int:
    """Characters that two prompts begin with alike."""
    return len(commonprefix([text, longer]))


def sigmoid(x: float) -> float:
    small = math.exp(-abs(x))
    return 1 / (1 + small) if x >= 0 else small / (1 + small)
