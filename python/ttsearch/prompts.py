"""What the policy reads before its first step; after it, branches continue on ids, never on templates."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .stops import compile_stops

QWEN_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
LLAMA_SYSTEM = (
    "Solve the following math problem efficiently and clearly:\n\n"
    "- For simple problems (2 steps or fewer):\nProvide a concise solution with minimal explanation.\n\n"
    "- For complex problems (3 steps or more):\nUse this step-by-step format:\n\n"
    "## Step 1: [Concise description]\n[Brief explanation and calculations]\n\n"
    "## Step 2: [Concise description]\n[Brief explanation and calculations]\n\n...\n\n"
    "Regardless of the approach, always conclude with:\n\n"
    "Therefore, the final answer is: $\\boxed{answer}$. I hope it is correct.\n\n"
    "Where [answer] is just the final number or expression that solves the problem."
)


@dataclass(frozen=True)
class PromptStyle:
    """`system` is the system turn, `suffix` ends the user turn; "plain" is the problem text as it is."""

    name: str
    chat: bool
    system: str | None = None
    suffix: str = ""


STYLES = {
    style.name: style
    for style in (
        PromptStyle("plain", chat=False),
        PromptStyle("qwen", chat=True, system=QWEN_SYSTEM),
        PromptStyle("llama", chat=True, system=LLAMA_SYSTEM),
        PromptStyle("r1", chat=True, suffix=f"\n{QWEN_SYSTEM}"),
    )
}


def detect_style(tokenizer, model_type: str = "", name: str = "") -> PromptStyle:
    """ "plain" without a chat template; else by the model's type and name or path, "qwen" if nothing fits."""
    if not getattr(tokenizer, "chat_template", None):
        return STYLES["plain"]
    if re.search(r"(?<![a-z0-9])r1(?![a-z0-9])", name.lower()):
        return STYLES["r1"]
    return STYLES["llama"] if model_type == "llama" else STYLES["qwen"]


class TextPolicy:
    """A prompt style bound to a tokenizer: prompt ids in, step text out, and the stop table between."""

    def __init__(self, tokenizer, style: PromptStyle | str, eos_ids, vocab_size: int | None = None):
        if isinstance(style, str):
            if style not in STYLES:
                raise ValueError(f"prompt style must be one of {', '.join(STYLES)}, got {style!r}")
            style = STYLES[style]
        if style.chat and not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f'prompt style {style.name!r} needs a chat template, this tokenizer has none; use "plain"'
            )
        self.tokenizer, self.style = tokenizer, style
        self.eos_ids = frozenset(eos_ids)
        self.next_state = compile_stops(tokenizer, self.eos_ids, vocab_size)

    def prompt_ids(self, problem: str) -> list[int]:
        if not self.style.chat:
            return list(self.tokenizer(problem).input_ids)
        system = [{"role": "system", "content": self.style.system}] if self.style.system else []
        messages = [*system, {"role": "user", "content": problem + self.style.suffix}]
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def decode(self, ids) -> str:
        """Text of one step's ids; special tokens have none."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def finish_reason(self, state: int, last_id: int) -> str:
        """Why a row ended; `state` is its last stop-table entry, >= 0 where a token limit cut it."""
        if state >= 0:
            return "length"
        return "step" if state == -1 else "eos" if last_id in self.eos_ids else "boxed"
