"""Score heads of process reward models as data: which weights they have and how logits become a score."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch

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


@dataclass(frozen=True)
class HeadKind:
    """Weight names of a kind of checkpoint. `architectures` are patterns of config.json's architectures entry."""

    name: str
    architectures: tuple[str, ...]
    weight: str
    bias: str
    bias_required: bool = False
    inner_weight: str | None = None
    inner_bias: str | None = None
    labels: int | None = None  # None: any number
    reads: Mapping[int, HeadSpec] = field(default_factory=dict)  # number of labels -> how they are read

    def names(self) -> tuple[str, ...]:
        return tuple(n for n in (self.weight, self.bias, self.inner_weight, self.inner_bias) if n)

    def required(self) -> tuple[str, ...]:
        return tuple(n for n in self.names() if n != self.bias or self.bias_required)


BINARY = {2: HeadSpec(mix=(0, 1))}
HEAD_KINDS = (
    HeadKind(  # Skywork-o1-Open-PRM
        "value head",
        ("*ForPrmModel", "*PRM_MODEL"),
        "v_head.summary.weight",
        "v_head.summary.bias",
        bias_required=True,
        labels=1,
        reads={1: HeadSpec(squash="sigmoid")},
    ),
    HeadKind(  # Qwen2.5-Math-PRM
        "two-layer classifier",
        ("*ForProcessRewardModel",),
        "score.2.weight",
        "score.2.bias",
        bias_required=True,
        inner_weight="score.0.weight",
        inner_bias="score.0.bias",
        reads=BINARY,
    ),
    HeadKind(  # TRL, PURE: two labels; MathMinos: one
        "token classifier",
        ("*ForTokenClassification",),
        "score.weight",
        "score.bias",
        reads=BINARY | {1: HeadSpec(squash="none")},
    ),
)


def head_kind(architecture: str, names: Collection[str]) -> HeadKind | None:
    """The kind of head of a checkpoint with these weight names; None: a plain language model.

    Raises:
        ValueError: an architecture that is neither, or one whose head weights are not in the files.
    """
    for kind in HEAD_KINDS:
        if any(fnmatch(architecture, pattern) for pattern in kind.architectures) or kind.weight in names:
            missing = [name for name in kind.required() if name not in names]
            if missing:
                raise ValueError(
                    f"a {architecture} checkpoint must hold {missing[0]} ({kind.name}), which is in none of its files; "
                    "the download or the export is incomplete"
                )
            return kind
    if not fnmatch(architecture, "*ForCausalLM"):
        raise ValueError(
            f"architectures must name a *ForCausalLM or one of "
            f"{', '.join(p for kind in HEAD_KINDS for p in kind.architectures)}, got {architecture!r}; "
            "add a HeadKind to ttskernels/models/heads.py"
        )
    return None


def build_head(
    kind: HeadKind, weights: Mapping[str, Tensor], hidden: int, spec: HeadSpec | None = None
) -> ScoreHead:
    """Take the head's weights.

    Raises:
        ValueError: a weight of the wrong shape; a `spec` for another kind of head; more labels than the kind knows how
            to read and no `spec` that says so.
    """
    if spec is not None and (spec.rows or spec.vocab_mean):
        raise ValueError(
            f"head must leave rows and vocab_mean empty, got {spec}: the checkpoint has a {kind.name}, not a plain "
            "language model; this verifier is of another family"
        )
    weight = weights[kind.weight]
    bias = weights.get(kind.bias)
    inner_weight, inner_bias = weights.get(kind.inner_weight or ""), weights.get(kind.inner_bias or "")
    inner = hidden
    if inner_weight is not None:
        inner = inner_weight.shape[0]
        _expect(kind.inner_weight, inner_weight, (inner, hidden))
        _expect(kind.inner_bias, inner_bias, (inner,))
    labels = kind.labels or weight.shape[0]
    _expect(kind.weight, weight, (labels, inner))
    if bias is not None:
        _expect(kind.bias, bias, (labels,))
    if spec is None:
        if labels not in kind.reads:
            raise ValueError(
                f"head must be a HeadSpec whose mix says what each of the {labels} labels of {kind.weight} counts, got "
                f"None; without one a {kind.name} has {' or '.join(map(str, kind.reads))}"
            )
        spec = kind.reads[labels]
    wide = [None if t is None else t.float().contiguous() for t in (weight, bias, inner_weight, inner_bias)]
    return ScoreHead(*wide, **spec.reading(labels))


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


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} must have shape {shape}, got {tuple(tensor.shape)}; the file is not of this model"
        )
