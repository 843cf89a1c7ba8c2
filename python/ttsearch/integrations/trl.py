"""A process reward model as a TRL reward function: `GRPOTrainer(reward_funcs=PrmReward("path/of/prm"), ...)`.

TRL (docs "Using a custom reward function") calls `reward(prompts=..., completions=..., completion_ids=..., trainer_state=...,
and every other column)` and takes a list with a float, or None for "does not apply", for each completion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..aggregate import AGGREGATES
from ..protocols import Verifier
from ..scoring import SolutionScores, own_verifier, score_steps
from ..solutions import SEPARATOR

Message = dict[str, Any]


class PrmReward:
    """Scores completions step by step; the completions of one prompt share it and every common prefix of steps.

    Args:
        verifier: checkpoint folder or hub id (loaded here), or a `Verifier`, which the caller keeps open.
        aggregate: reward from step scores: "min", "mean", "last" or "product".
        separator: cuts a completion into steps.
        name: how the trainer logs this reward.
        options: for `load_verifier` (`family`, `dtype`, `kv_bytes`, ...).
    Raises:
        ValueError: unknown aggregate; options for a verifier that is loaded already.
    """

    def __init__(
        self,
        verifier: Verifier | str | Path,
        aggregate: str = "min",
        separator: str = SEPARATOR,
        name: str = "prm_reward",
        **options: Any,
    ):
        if aggregate not in AGGREGATES:
            raise ValueError(f"aggregate must be one of {', '.join(AGGREGATES)}, got {aggregate!r}")
        self.aggregate, self.separator, self.__name__ = aggregate, separator, name
        self.verifier, self._own = own_verifier(verifier, **options)

    def __call__(
        self, prompts: Sequence[str | list[Message]], completions: Sequence[str | list[Message]], **kwargs: Any
    ) -> list[float | None]:
        """One reward for each completion; None where it has no step, is too long for the verifier, or failed."""
        if len(prompts) != len(completions):
            raise ValueError(f"prompts and completions must be of one length, got {len(prompts)} and {len(completions)}")
        texts = [message_text(completion) for completion in completions]
        scored = [i for i, text in enumerate(texts) if any(map(str.strip, text.split(self.separator)))]
        results = score_steps(
            [question(prompts[i]) for i in scored], [[texts[i]] for i in scored], self.verifier, separator=self.separator
        )
        rewards: list[float | None] = [None] * len(texts)
        for i, (result,) in zip(scored, results, strict=True):
            rewards[i] = self._reward(result)
        return rewards

    def _reward(self, result: SolutionScores) -> float | None:
        if self.aggregate == "product" and result.last is not None and result.product is None:
            raise ValueError('aggregate="product" needs step scores in [0, 1]; use "min", "mean" or "last"')
        value = getattr(result, self.aggregate)
        return value if value is not None and math.isfinite(value) else None

    def close(self) -> None:
        """Free the verifier, if it was loaded here."""
        if self._own:
            self.verifier.close()


def text_of(content: Any) -> str:
    """The text of a message's content: a string, a list of parts, or None (a tool call)."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        texts = [part.get("text") for part in content if part.get("type") == "text"]
        if all(isinstance(text, str) for text in texts):
            return "".join(texts)
    raise ValueError(
        f'content of a message must be a text, a list of parts such as {{"type": "text", "text": ...}}, or None, got {content!r}'
    )


def message_text(completion: str | list[Message]) -> str:
    """The text of a completion, which may be a list of messages."""
    if isinstance(completion, str):
        return completion
    return "\n\n".join(text_of(message.get("content")) for message in completion if message.get("role") == "assistant")


def question(prompt: str | list[Message]) -> str:
    """The problem a prompt asks: its text, or that of its only user turn (system turns are the policy's, not the PRM's).

    Raises:
        ValueError: no user turn, or several: a process reward model reads one question.
    """
    if isinstance(prompt, str):
        return prompt
    asked = [text_of(message.get("content")) for message in prompt if message.get("role") == "user"]
    if len(asked) != 1:
        raise ValueError(f"a conversation must have one user turn for a process reward model to read, got {len(asked)}")
    return asked[0]
