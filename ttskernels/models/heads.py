"""Score heads of process reward models as data: which weights they have and how logits become a score."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch

from torch import Tensor

SQUASHES = ("softmax", "sigmoid", "none", "difference")


@dataclass(frozen=True, eq=False)
class ScoreHead:
    """A head in the form op `step_score` takes; all weights float32 (a head is small, its rounding is not)."""

    weight: Tensor  # [labels, hidden or inner]
    bias: Tensor | None = None  # [labels]
    inner_weight: Tensor | None = None  # [inner, hidden], followed by ReLU
    inner_bias: Tensor | None = None
    squash: str = "softmax"  # softmax: p[label]; sigmoid, none: of logit [label]; difference: p[label] - p[0]
    label: int = 0


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
    squash: str = "softmax"
    label: int = 1

    def names(self) -> tuple[str, ...]:
        return tuple(n for n in (self.weight, self.bias, self.inner_weight, self.inner_bias) if n)

    def required(self) -> tuple[str, ...]:
        return tuple(n for n in self.names() if n != self.bias or self.bias_required)


HEAD_KINDS = (
    HeadKind(  # Skywork-o1-Open-PRM
        "value head",
        ("*ForPrmModel", "*PRM_MODEL"),
        "v_head.summary.weight",
        "v_head.summary.bias",
        bias_required=True,
        labels=1,
        squash="sigmoid",
        label=0,
    ),
    HeadKind(  # Qwen2.5-Math-PRM
        "two-layer classifier",
        ("*ForProcessRewardModel",),
        "score.2.weight",
        "score.2.bias",
        bias_required=True,
        inner_weight="score.0.weight",
        inner_bias="score.0.bias",
    ),
    HeadKind("token classifier", ("*ForTokenClassification",), "score.weight", "score.bias"),  # TRL, PURE
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


def build_head(kind: HeadKind, weights: Mapping[str, Tensor], hidden: int) -> ScoreHead:
    """Take the head's weights; a head with one logit is not squashed by softmax."""
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
    squash, label = (kind.squash, kind.label) if labels > kind.label else ("none", 0)
    wide = [None if t is None else t.float().contiguous() for t in (weight, bias, inner_weight, inner_bias)]
    return ScoreHead(*wide, squash=squash, label=label)


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} must have shape {shape}, got {tuple(tensor.shape)}; the file is not of this model"
        )


def lm_rows_head(lm_head: Tensor, good: int, bad: int) -> ScoreHead:
    """Probability of token `good` against `bad`: softmax over two logits is the sigmoid of one difference row."""
    rows = lm_head[[good, bad]].float()
    return ScoreHead((rows[0] - rows[1])[None], squash="sigmoid")


def vocab_mean_head(lm_head: Tensor) -> ScoreHead:
    """Sigmoid of the mean logit over the vocabulary: the mean of `h . E_v` is `h . mean(E)` (Llemma PRM of REBASE)."""
    return ScoreHead(lm_head.float().mean(0, keepdim=True), squash="sigmoid")
