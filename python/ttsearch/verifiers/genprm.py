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
from .render import clean
from .writer import Draft, Thread, Unreadable, Writer
from .written import (
    NO_JUDGEMENT,
    UNFINISHED,
    GenerativeFamily,
    State,
    Verdict,
    Verification,
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

    def __post_init__(self):
        super().__post_init__()
        for name in ("analyze_end", "output_end"):
            if not getattr(self, name):
                raise ValueError(f"{name} of generative family {self.name!r} must not be empty: a draft stops there")

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
            writer.release(thread, *([chain] if chain else []))
            return None
        try:
            drafts = await writer.write(thread, self.samples, key, (self.analyze_end,), self.max_tokens, include=True)
        finally:
            writer.release(thread, *([chain] if chain else []))
        ended: dict[int, Thread] = {}
        verdict = asyncio.ensure_future(
            verdict_of(thread.added, (self._judge(writer, draft, child_key(key, i), i, ended) for i, draft in enumerate(drafts)))
        )
        try:
            await asyncio.wait([verdict])
        except asyncio.CancelledError:
            verdict.cancel()
            await asyncio.gather(verdict, return_exceptions=True)
            writer.release(*ended.values())
            raise
        first = min(ended, default=None)
        held = ended.pop(first) if ended else None
        writer.release(*ended.values())
        content = analyze + verdict.result().verifications[first].text if held and not verdict.exception() else ""
        return (
            replace(
                state,
                steps=(*state.steps, step),
                held=held,
                messages=(*messages, {"role": "assistant", "content": content}),
                text=text + content,
            ),
            verdict,
        )

    async def _judge(
        self, writer: Writer, writing: asyncio.Task[Draft], key: int, i: int, ended: dict[int, Thread]
    ) -> Verification:
        """Sample `i`; where it is judged its thread goes to `ended`."""
        first = await writing
        try:
            tokens = first.thread.added
            if first.stop != self.analyze_end:
                return Verification(tokens, failure=UNFINISHED if first.stop is None else NO_JUDGEMENT)
            opened = self.verify or self.output
            thread = await writer.append(first.thread, opened)
        finally:
            writer.release(first.thread)
        try:
            [writing] = await writer.write(thread, 1, key, (self.output_end,), self.max_tokens - tokens, include=True)
        finally:
            writer.release(thread)
        second = await writing
        tokens += thread.added + second.thread.added
        try:
            judged = list(re.finditer("|".join(re.escape(f"{choice}}}") for choice in self.choices), second.text))
            failure = UNFINISHED if second.stop is None else NO_JUDGEMENT if not judged else None
            if failure is None:
                odds = await writer.log_odds(writer.cut(second, judged[-1].start()), "")
                ended[i] = second.thread
                return Verification(tokens, sigmoid(odds), clean(first.text) + opened + clean(second.text))
        except Unreadable as reason:
            failure = str(reason)
        finally:
            if i not in ended:
                writer.release(second.thread)
        return Verification(tokens, failure=failure)
