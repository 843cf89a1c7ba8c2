"""ThinkPRM: a verifier that writes a critique of the solution so far and is then asked whether it is correct.

Khalifa et al. 2025, "Process Reward Models That Think", arXiv:2504.16828; read in mukhal/ThinkPRM utils/helper.py and
prm/thinkprm_api.py. One score for a solution so far, not one for each of its steps.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .family import fill
from .writer import Draft, Thread, Unreadable, Writer
from .written import (
    UNFINISHED,
    GenerativeFamily,
    State,
    Verdict,
    Verification,
    render_chat,
    shared_length,
    sigmoid,
    verdict_of,
)

_LABEL = re.compile(r"(?:## )?Step \d+:")


@dataclass(frozen=True)
class ThinkPrm(GenerativeFamily):
    """Fields as published; replace them for a verifier that was trained on other text.

    A draft ends at any of `ends`, at the end of text, or where it begins a step that the solution does not have
    (`step_end`). Then `question` is forced upon it and the odds of `choices` behind it are read:
    P(yes) = sigmoid((log p(yes) - log p(no)) / decision_temperature).
    """

    name: str = "thinkprm"
    source: str = "launch/ThinkPRM-{1.5B,7B,14B}; mukhal/ThinkPRM utils/helper.py, prm/thinkprm_api.py"
    known_as: tuple[str, ...] = ("*thinkprm*",)
    turn: str = (
        "You are given a math problem and a proposed step-by-step solution:\n\n[Math Problem]\n\n{problem}\n\n"
        "[Solution]\n\n{solution}\n\nReview and critique each step in the proposed solution to determine whether each "
        "step is correct. If the solution is incomplete, only verify the provided steps."
    )
    step: str = "Step {n}: {step}"
    between: str = "\n"
    opening: str = "\nLet's verify step by step:"
    ends: tuple[str, ...] = ("Is the solution correct?", "</think>")
    step_end: str = "Step {n}:"
    question: str = "\nIs the solution correct? "
    decision_temperature: float = 1.0
    max_tokens: int = 8172  # published: 8192, less 20

    def __post_init__(self):
        super().__post_init__()
        if not self.decision_temperature > 0:
            raise ValueError(f"decision_temperature must be > 0, got {self.decision_temperature}")
        if not all(self.ends) or not (self.ends or self.step_end):
            raise ValueError(f"ends of generative family {self.name!r} must be texts that are not empty, got {self.ends!r}")
        for field, text, needed in (("turn", self.turn, "{problem}"), ("turn", self.turn, "{solution}"),
                                    ("step", self.step, "{step}")):  # fmt: skip
            if needed not in text:
                raise ValueError(f"{field} of generative family {self.name!r} must hold {needed}, got {text!r}")

    @property
    def forced(self) -> str:
        return self.question

    def stops(self, max_steps: int) -> tuple[str, ...]:
        return (*self.ends, *(fill(self.step_end, n=str(i)) for i in range(2, max_steps + 2) if self.step_end))

    def prompt(self, tokenizer, problem: str, steps: Sequence[str]) -> str:
        """The whole text before a critique. A step's own "Step 3:" gives way to its number."""
        written = [fill(self.step, step=_LABEL.sub("", step).strip(), n=str(i)) for i, step in enumerate(steps, 1)]
        turn = fill(self.turn, problem=problem, solution=self.between.join(written))
        return render_chat(tokenizer, [{"role": "user", "content": turn}]) + self.opening

    def start(self, tokenizer, problem: str) -> tuple[State, str, int]:
        one, other = (self.prompt(tokenizer, problem, [step]) for step in ("1", "x"))
        return State(problem), one, shared_length(one, other)

    async def advance(
        self, writer: Writer, tokenizer, state: State, step: str, key: int
    ) -> tuple[State, asyncio.Task[Verdict]] | None:
        steps = (*state.steps, step)
        text = self.prompt(tokenizer, state.problem, steps)
        stable = shared_length(text, self.prompt(tokenizer, state.problem, (*steps, "x")))
        begun = await writer.begin(text, stable, state.held or state.root)
        if begun is None:
            return None
        chain, thread = begun
        verdict = asyncio.ensure_future(self._verify(writer, thread, len(steps), key))
        return replace(state, steps=steps, held=chain), verdict

    async def _verify(self, writer: Writer, thread: Thread, count: int, key: int) -> Verdict:
        ends = (*self.ends, fill(self.step_end, n=str(count + 1))) if self.step_end else self.ends
        try:
            drafts = await writer.write(thread, self.samples, key, ends, self.max_tokens)
        finally:
            writer.release(thread)
        return await verdict_of(thread.added, (self._decide(writer, draft) for draft in drafts))

    async def _decide(self, writer: Writer, writing: asyncio.Task[Draft]) -> Verification:
        draft = await writing
        try:
            tokens = draft.thread.added
            if draft.stop is None:
                return Verification(tokens, failure=UNFINISHED)
            odds = await writer.log_odds(draft.thread, self.question)
        except Unreadable as reason:
            return Verification(tokens, failure=str(reason))
        finally:
            writer.release(draft.thread)
        return Verification(tokens, sigmoid(odds / self.decision_temperature), draft.text)
