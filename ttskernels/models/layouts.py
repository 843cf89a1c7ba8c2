"""How checkpoints of process reward models are laid out, as data: names of head weights, files, what is refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from torch import Tensor

from ttskernels.models.heads import HeadSpec, ScoreHead

WRAPPER = "pretrained_model."  # of TRL's value-head wrapper, in files written by DeepSpeed (PQM)
HEAD_FILES = {"reward_head.pt": "reward_head."}  # files beside the model's own; their weights get the prefix


@dataclass(frozen=True, kw_only=True)
class HeadKind:
    """Weight names of a kind of checkpoint, known by config.json's architectures entry or by those names."""

    name: str
    architectures: tuple[str, ...] = ()  # patterns
    weight: str
    bias: str
    bias_entries: tuple[
        str, ...
    ] = ()  # config.json entries that say whether there is a bias; the first present one does
    bias_default: bool = True  # if none is present
    inner_weight: str | None = None
    inner_bias: str | None = None
    labels: int | None = None  # None: any number
    reads: Mapping[int, HeadSpec] = field(
        default_factory=dict
    )  # number of labels -> how they are read without a HeadSpec

    def names(self, raw: Mapping[str, Any]) -> tuple[str, ...]:
        """Every weight the head has with this config.json."""
        bias = next((bool(raw[e]) for e in self.bias_entries if e in raw), self.bias_default)
        return tuple(n for n in (self.weight, self.bias if bias else None, self.inner_weight, self.inner_bias) if n)


PROBABILITY = {2: HeadSpec(mix=(0, 1))}
HEAD_KINDS = (
    HeadKind(  # PQM, and any other *ForCausalLM in TRL's wrapper: the raw value
        name="value head of TRL",
        weight="v_head.summary.weight",
        bias="v_head.summary.bias",
        labels=1,
        reads={1: HeadSpec(squash="none")},
    ),
    HeadKind(  # Skywork-o1-Open-PRM
        name="value head",
        architectures=("*ForPrmModel", "*PRM_MODEL"),
        weight="v_head.summary.weight",
        bias="v_head.summary.bias",
        labels=1,
        reads={1: HeadSpec(squash="sigmoid")},
    ),
    HeadKind(  # Qwen2.5-Math-PRM
        name="two-layer classifier",
        architectures=("*ForProcessRewardModel",),
        weight="score.2.weight",
        bias="score.2.bias",
        inner_weight="score.0.weight",
        inner_bias="score.0.bias",
        reads=PROBABILITY,
    ),
    HeadKind(  # TRL, PURE: two labels; MathMinos: one
        name="token classifier",
        architectures=("*ForTokenClassification",),
        weight="score.weight",
        bias="score.bias",
        bias_entries=("token_classification_bias",),
        reads=PROBABILITY | {1: HeadSpec(squash="none")},
    ),
    HeadKind(  # ReasonEval-7B (use_bias) and -34B (bias): negative, neutral, positive; valid is not negative
        name="score head",
        architectures=("ReasonEval*",),
        weight="score_head.weight",
        bias="score_head.bias",
        bias_entries=("use_bias", "bias"),
        bias_default=False,
        labels=3,
        reads={3: HeadSpec(mix=(0, 1, 1))},
    ),
    HeadKind(  # ReasonFlux-PRM-1.5B: reward_head.pt beside a language model
        name="reward head",
        weight="reward_head.weight",
        bias="reward_head.bias",
        labels=1,
        reads={1: HeadSpec(squash="sigmoid")},
    ),
)


@dataclass(frozen=True)
class Refusal:
    """A checkpoint that is known and not loaded. `names` are patterns, in lower case, of what it is called."""

    name: str
    names: tuple[str, ...]
    reason: str


REFUSED = (
    Refusal(
        "ReasonFlux-PRM-7B",
        ("*reasonflux-prm-7b*",),
        "its remote code should return two labels a token, but its published files are reported to load as a plain "
        "language model (outputs [1, tokens, 152064], ReasonFlux issue 20), so which weights are its head is not known",
    ),
    Refusal(
        "Babelscape's PDDL PRMs",
        ("*babelscape/*prm*", "*babelscape--*prm*", "*prm800k-r"),
        "their regression head (pred_scalar) exists in the repository's remote code only, and its weights' names and "
        "what it computes have not been checked on real weights",
    ),
)


def refuse(source: str, folder: Path, raw: Mapping[str, Any]) -> None:
    """Raise ValueError for a checkpoint that is refused by name: of its source, folder, or in its config.json."""
    paths = [source, str(raw.get("_name_or_path") or "")]
    called = ["/".join(Path(path).parts[-2:]) for path in paths]  # owner/name
    called += [folder.name, *(part for part in folder.parts if part.startswith("models--"))]  # the hub's cache
    for refusal in REFUSED:
        if found := next((c for c in called for p in refusal.names if fnmatch(c.lower(), p)), None):
            raise ValueError(
                f"{refusal.name} ({found}) is not supported: {refusal.reason}. Use another process reward model; "
                "if you can check the real weights, add a HeadKind to ttskernels/models/layouts.py"
            )


def head_kind(raw: Mapping[str, Any], names: Collection[str]) -> HeadKind | None:
    """The kind of head of a checkpoint with this config.json and these weights; None: a plain language model.

    Raises:
        ValueError: an architecture that is neither, or one whose head weights are not in the files.
    """
    architecture = (raw.get("architectures") or [""])[0]
    kind = next((k for k in HEAD_KINDS if any(fnmatch(architecture, p) for p in k.architectures)), None)
    if kind is None:
        if not fnmatch(architecture, "*ForCausalLM"):
            raise ValueError(
                f"architectures must name a *ForCausalLM or one of "
                f"{', '.join(p for kind in HEAD_KINDS for p in kind.architectures)}, got {architecture!r}; "
                "add a HeadKind to ttskernels/models/layouts.py"
            )
        kind = next((k for k in HEAD_KINDS if k.weight in names), None)
    if kind and (missing := [name for name in kind.names(raw) if name not in names]):
        raise ValueError(
            f"a {architecture} checkpoint must hold {missing[0]} ({kind.name}), which is in none of its files; "
            "the download or the export is incomplete"
        )
    return kind


def build_head(kind: HeadKind, weights: Mapping[str, Tensor], hidden: int, spec: HeadSpec | None = None) -> ScoreHead:
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


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}; the file is not of this model")
