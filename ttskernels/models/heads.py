"""Score heads of process reward models: what is wanted of a checkpoint, and the form op `step_score` takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ttskernels.ops.step_score import SQUASHES


@dataclass(frozen=True)
class HeadSpec:
    """How a checkpoint's head is to be read; what it leaves empty is as the checkpoint's own kind says.

    With `rows` or `vocab_mean` the checkpoint is a language model (`*ForCausalLM`) and the head is made of its
    vocabulary rows, of which nothing else is kept. With neither, the checkpoint has a head of its own, and `squash` and
    `mix` say how its labels become a score.
    """

    rows: tuple[int, ...] = ()  # token ids: a label each
    vocab_mean: bool = False  # one label: the mean logit over the vocabulary (Llemma PRM of REBASE)
    squash: str = "softmax"
    mix: tuple[float, ...] = ()  # how much each label counts; may be left out for one label

    def __post_init__(self):
        if self.squash not in SQUASHES:
            raise ValueError(f"squash must be one of {SQUASHES}, got {self.squash!r}")
        if self.rows and self.vocab_mean:
            raise ValueError(f"rows must be empty with vocab_mean, got {self.rows}; a head is one or the other")
        if len(set(self.rows)) != len(self.rows) or any(row < 0 for row in self.rows):
            raise ValueError(f"rows must be distinct token ids, got {self.rows}")
        if self.rows or self.vocab_mean:
            self.reading(len(self.rows) or 1)

    def reading(self, labels: int) -> dict[str, str | Tensor | None]:
        """`squash` and `mix` of a head with so many labels, as `step_score` takes them.

        Raises:
            ValueError: they do not fit so many labels.
        """
        if len(self.mix) != labels and (self.mix or labels != 1):
            raise ValueError(f"mix must have a number for each of {labels} labels, got {self.mix}")
        if not all(map(math.isfinite, self.mix)):
            raise ValueError(f"mix must be finite, got {self.mix}")
        if labels == 1 and self.squash == "softmax":
            raise ValueError("squash must be 'sigmoid' or 'none' for one label, got 'softmax', which is always 1")
        return {"squash": self.squash, "mix": torch.tensor(self.mix, dtype=torch.float32) if self.mix else None}


@dataclass(frozen=True, eq=False)
class ScoreHead:
    """A head in the form op `step_score` takes; all weights float32 (a head is small, its rounding is not)."""

    weight: Tensor  # [labels, hidden or inner]
    bias: Tensor | None = None  # [labels]
    inner_weight: Tensor | None = None  # [inner, hidden], followed by ReLU
    inner_bias: Tensor | None = None
    squash: str = "softmax"
    mix: Tensor | None = None  # [labels] float32; None: one label

    def to(self, device: torch.device) -> ScoreHead:
        """The same head with its weights on `device`."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return ScoreHead(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in parts.items()})


def language_model_head(spec: HeadSpec, lm_head: Tensor) -> ScoreHead:
    """The head that `spec` makes of a vocabulary head `[vocab, hidden]`, without a `[tokens, vocab]` tensor ever.

    The probability of one of two rows is the sigmoid of their difference row; the mean of `h . E_v` over the
    vocabulary is `h . mean(E)`.

    Raises:
        ValueError: `spec` names no row, or one outside the vocabulary.
    """
    if spec.vocab_mean:
        return ScoreHead(lm_head.mean(0, keepdim=True, dtype=torch.float32), **spec.reading(1))
    if not spec.rows or max(spec.rows) >= lm_head.shape[0]:
        raise ValueError(
            f"head must name rows in 0..{lm_head.shape[0] - 1} of the language-model head, or vocab_mean, got {spec}; "
            "the checkpoint is a plain language model without a score head"
        )
    weight = lm_head[list(spec.rows)].float()
    if spec.squash == "softmax" and spec.mix in ((1, 0), (0, 1)):
        wanted = spec.mix.index(1)
        return ScoreHead((weight[wanted] - weight[1 - wanted])[None], squash="sigmoid")
    return ScoreHead(weight, **spec.reading(len(spec.rows)))
