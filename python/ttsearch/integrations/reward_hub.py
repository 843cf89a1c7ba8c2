"""A process reward model with the interface of reward-hub's `AbstractProcessRewardModel` (0.1.10), for its callers.

There, `score(messages, step_sep=..., aggregation_method=..., return_full_prm_result=...)` reads the last assistant turn of one
conversation or of several, and gives floats or `PRMResult` objects.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from typing import Any

from rich.console import Console

from ..protocols import Verifier
from ..scoring import SolutionScores, own_verifier, score_steps
from ..show import progress_bar
from ..solutions import SEPARATOR
from .trl import Message, question, text_of

METHODS = ("model", "prod", "min", "last")


class PRMResult:
    """Step scores of one conversation and what they come to, with the attributes of reward-hub's class."""

    def __init__(self, scores: Sequence[float], aggregation_method: str | Enum = "last"):
        method = method_name(aggregation_method)
        self.step_scores = list(scores)
        self.product, self.min, self.last = math.prod(scores), min(scores), scores[-1]
        self.score = {"prod": self.product, "min": self.min}.get(method, self.last)


class ProcessRewardModel:
    """Any PRM of `ttsearch.verifiers` behind reward-hub's interface; conversations share what they have in common.

    Args:
        model_name: checkpoint folder or hub id (loaded here), or a `Verifier`, which the caller keeps open.
        options: for `load_verifier` (`family`, `dtype`, `kv_bytes`, ...).
    """

    def __init__(self, model_name: str | Path | Verifier, **options: Any):
        self.verifier, self._own = own_verifier(model_name, **options)

    def score(
        self,
        messages: list[list[Message]] | list[Message],
        max_input_tokens: int = 8192,
        step_sep: str = SEPARATOR,
        aggregation_method: str | Enum = "last",
        return_full_prm_result: bool = False,
        use_tqdm: bool = False,
    ) -> list[PRMResult] | list[float]:
        """Score the last assistant turn of each conversation.

        Args:
            messages: one conversation (a list of messages) or several: a user turn (and, if need be, a system turn) and the
                assistant's turn to be scored.
            max_input_tokens: a longer conversation is an error; nothing is cut.
            aggregation_method: "last", "min", "prod", or "model": the whole turn is one step.
        Raises:
            ValueError: unknown method, a conversation of another form, too long, or without a step.
        """
        method = method_name(aggregation_method)
        conversations = [messages] if messages and isinstance(messages[0], dict) else messages
        if not conversations:
            raise ValueError("messages must hold at least one conversation, got none")
        for i, conversation in enumerate(conversations):
            if not conversation or conversation[-1].get("role") != "assistant":
                raise ValueError(f"messages[{i}] must end with the assistant's turn that is to be scored")
        answers = [text_of(conversation[-1].get("content")) for conversation in conversations]
        questions = [question(conversation[:-1]) for conversation in conversations]
        solutions = [[[answer]] if method == "model" else [answer] for answer in answers]
        with progress_bar(Console(stderr=True), "conversations") if use_tqdm else nullcontext() as progress:
            scored = score_steps(questions, solutions, self.verifier, separator=step_sep, progress=progress)
        results = []
        for i, (result,) in enumerate(scored):
            _check(result, max_input_tokens, f"messages[{i}]")
            results.append(PRMResult(result.scores, method))
        return results if return_full_prm_result else [result.score for result in results]

    def close(self) -> None:
        """Free the verifier, if it was loaded here."""
        if self._own:
            self.verifier.close()


def method_name(method: str | Enum) -> str:
    """reward-hub's `AggregationMethod` or its value."""
    name = method.value if isinstance(method, Enum) else method
    if name not in METHODS:
        raise ValueError(f"aggregation_method must be one of {', '.join(METHODS)}, got {name!r}")
    return name


def _check(result: SolutionScores, max_input_tokens: int, where: str) -> None:
    if result.refused or result.error:
        raise ValueError(f"{where}: {result.refused or result.error}")
    tokens = result.tokens_computed + result.tokens_reused
    if tokens > max_input_tokens:
        raise ValueError(f"{where} took {tokens} tokens, max_input_tokens is {max_input_tokens}; raise it or shorten the text")
