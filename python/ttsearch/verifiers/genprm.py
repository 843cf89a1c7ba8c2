r"""GenPRM: a verifier that analyses every step, may write code to check it, and then boxes Yes or No.

Zhao et al. 2025, "GenPRM: Scaling Test-Time Compute of Process Reward Models via Generative Reasoning",
arXiv:2504.00891; read in RyanLiu112/GenPRM src/prm_evaluation. The published verifier runs the code and writes its
output into the text. Here code that a model writes is never run: it is text, and what the model says it printed is the
model's own guess (the published `execute=False`).
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, replace

from ttskernels.engine.keys import child_key

from .family import fill
from .spelling import clean
from .writer import Draft, Thread, Writer
from .written import (
    NO_JUDGEMENT,
    UNFINISHED,
    Failed,
    GenerativeFamily,
    State,
    Verdict,
    render_chat,
    shared_length,
    sigmoid,
    verdict_of,
)  # fmt: skip


@dataclass(frozen=True)
class GenPrm(GenerativeFamily):
    r"""Fields as published. One chat: a step is a user's turn, its verification the assistant's, kept for later steps.

    `analyze` opens the turn and is written on up to `analyze_end`; then `verify`, or `output` if that is empty, up to
    `output_end`. The score is P(Yes) / (P(Yes) + P(No)) where the turn's last `\boxed{Yes}` or `\boxed{No}` decides. Of
    several samples the first that ended stays in the chat.
    """

    name: str = "genprm"
    source: str = "GenPRM/GenPRM-{1.5B,7B,32B}; RyanLiu112/GenPRM src/prm_evaluation"
    known_as: tuple[str, ...] = ("*genprm*",)
    choices: tuple[str, str] = ("Yes", "No")
    system: str = "You are a math teacher. Your task is to review and critique the paragraphs in solution step by step."
    first_step: str = "{problem}\n{step}"
    analyze: str = "<analyze>\nLet's analyze the Paragraph {n} step by step: "
    analyze_end: str = "</analyze>\n"
    verify: str = "<verify>\nLet's use python code to find any potential error:\n```python\n"
    output: str = "<output>\n**Judgement**: $\\boxed"
    output_end: str = "</output>\n"
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 20
    max_tokens: int = 2048  # of both parts together

    @property
    def forced(self) -> str:
        return "\\boxed{"

    def stops(self, max_steps: int) -> tuple[str, ...]:
        return (self.analyze_end, self.output_end)

    def start(self, tokenizer, problem: str) -> tuple[State, str, int]:
        system = ({"role": "system", "content": self.system},) if self.system else ()
        state = State(problem, messages=system)
        one, other = (render_chat(tokenizer, self._asked(state, step)) for step in ("1", "x"))
        return state, one, shared_length(one, other)

    def _asked(self, state: State, step: str) -> tuple[dict[str, str], ...]:
        content = step if state.steps else fill(self.first_step, problem=state.problem, step=step)
        return (*state.messages, {"role": "user", "content": content})

    async def advance(
        self, writer: Writer, tokenizer, state: State, step: str, key: int
    ) -> tuple[State, asyncio.Task[Verdict]] | None:
        messages = self._asked(state, step)
        text = render_chat(tokenizer, messages)
        analyze = fill(self.analyze, n=str(len(state.steps) + 1))
        chain = None
        if isinstance(state.held, Thread) and text.startswith(state.text):  # go on behind the very tokens it wrote
            thread = await writer.append(state.held, text[len(state.text) :] + analyze)
        else:
            begun = await writer.begin(text + analyze, len(text), state.root)
            if begun is None:
                return None
            chain, thread = begun
        if len(thread.ids) >= writer.limit:
            writer.release(thread)
            return None
        try:
            drafts = await writer.write(thread, self.samples, key, (self.analyze_end,), self.max_tokens, include=True)
        finally:
            writer.release(thread, *([chain] if chain else []))
        ended: dict[int, tuple[Thread, str]] = {}
        verdict = asyncio.ensure_future(
            verdict_of([
                asyncio.ensure_future(self._judge(writer, draft, child_key(key, i), i, ended))
                for i, draft in enumerate(drafts)
            ])
        )  # fmt: skip
        try:
            await asyncio.wait([verdict])
        except asyncio.CancelledError:
            verdict.cancel()
            await asyncio.gather(verdict, return_exceptions=True)
            writer.release(*(held for held, _ in ended.values()))
            raise
        kept = ended.pop(min(ended)) if ended else None
        writer.release(*(held for held, _ in ended.values()))
        content = analyze + kept[1] if kept else ""
        messages = (*messages, {"role": "assistant", "content": content})
        steps = (*state.steps, step)
        held, read = (kept[0], text + content) if kept else (None, "")
        return replace(state, steps=steps, held=held, messages=messages, text=read), verdict

    async def _judge(
        self, writer: Writer, writing: asyncio.Task[Draft], key: int, i: int, ended: dict[int, tuple[Thread, str]]
    ) -> tuple[float, str]:
        """The score of sample `i` and its text; its thread goes to `ended`."""
        first = await writing
        try:
            if first.stop is None or first.stop != self.analyze_end:
                raise Failed(UNFINISHED if first.stop is None else NO_JUDGEMENT)
            opened = self.verify or self.output
            thread = await writer.append(first.thread, opened)
        finally:
            writer.release(first.thread)
        room = self.max_tokens - (len(first.thread.ids) - first.start)
        try:
            [writing] = await writer.write(thread, 1, key, (self.output_end,), room, include=True)
        finally:
            writer.release(thread)
        second = await writing
        try:
            text = clean(first.text) + opened + clean(second.text)
            judged = list(re.finditer("|".join(re.escape(f"{choice}}}") for choice in self.choices), second.text))
            if second.stop is None:
                raise Failed(UNFINISHED)
            if not judged:
                raise Failed(NO_JUDGEMENT)
            odds = await writer.log_odds(writer.cut(second, judged[-1].start()), "")
        except BaseException:
            writer.release(second.thread)
            raise
        ended[i] = second.thread, text
        return sigmoid(odds), text
