"""Process reward models as data: what text they read, where the score is, and how it is squashed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

QWEN_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class PrmFamily:
    """One layout of input and head. Every step is tokenised once, alone, and followed by its suffix.

    The sequence is tok(prompt) ++ tok(step) ++ tok(suffix) for each step: a step's ids never depend on later
    text, so only new tokens go through the model.
    """

    name: str
    prompt: str  # with {problem}, and {bos} where the tokenizer's beginning-of-text token goes
    suffix: str  # behind every step
    head: Literal[
        "classifier", "value", "mlp2"
    ]  # [hidden, 2] / v_head.summary [hidden, 1] + bias / Linear, ReLU, Linear
    squash: Literal["softmax", "sigmoid"]
    label: int = 0  # which output is "good"
    read_offset: int = 0  # score position, counted from the last token of the suffix
    lines: Literal["keep", "join", "each"] = (
        "keep"  # newlines in a step: kept / made spaces / every line is scored
    )
    bos: Literal["if any", "required", "never"] = "never"
    max_length: int | None = None  # tokens; None: the model's max_position_embeddings
    source: str = ""


TRL = PrmFamily(
    name="trl", prompt="{bos}{problem}", suffix="\n", head="classifier", squash="softmax", label=1,
    bos="if any",
    source="TRL PRMTrainer: two labels, LABEL_1 is good, read at the last separator token",
)  # fmt: skip
TRL_BLANK_LINE = replace(
    TRL,
    name="trl-blank-line",
    suffix="\n\n",
    source="TRL PRMTrainer with step_separator='\\n\\n'; the demo verifier",
)
SKYWORK = PrmFamily(
    name="skywork", prompt="{bos}{problem}\n", suffix="\n", head="value", squash="sigmoid", lines="join",
    bos="required", max_length=4096,
    source="Skywork-o1-Open-PRM-Qwen-2.5-{1.5B,7B}; newlines in a step made spaces (compute-optimal-tts)",
)  # fmt: skip
QWEN_MATH = PrmFamily(
    name="qwen-math-prm",
    prompt=(
        f"<|im_start|>system\n{QWEN_SYSTEM}<|im_end|>\n"
        "<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n"
    ).replace("boxed{}", "boxed{{}}"),
    suffix="<extra_0>", head="mlp2", squash="softmax", label=1, max_length=4096,
    source="Qwen2.5-Math-PRM-{7B,72B}, Qwen2.5-Math-7B-PRM800K",
)  # fmt: skip

FAMILIES: dict[str, PrmFamily] = {f.name: f for f in (TRL, TRL_BLANK_LINE, SKYWORK, QWEN_MATH)}
_OVERRIDABLE = ("suffix", "prompt", "label", "lines", "max_length")


def get_family(name: str, **overrides: Any) -> PrmFamily:
    """A family by name, with single fields replaced (`suffix`, `prompt`, `label`, `lines`, `max_length`)."""
    if name not in FAMILIES:
        raise ValueError(f"PRM family must be one of {', '.join(FAMILIES)}, got {name!r}")
    unknown = set(overrides) - set(_OVERRIDABLE)
    if unknown:
        raise ValueError(
            f"fields of a PRM family that may be set are {', '.join(_OVERRIDABLE)}, got {sorted(unknown)}"
        )
    return replace(FAMILIES[name], **overrides)
