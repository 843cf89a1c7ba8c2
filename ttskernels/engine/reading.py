"""What becomes of the hidden states that score jobs read: a score by the model's head, or two models' log-ratio of a token."""

from __future__ import annotations

import torch
from torch import Tensor

from ttskernels.models.pair import PairModel
from ttskernels.ops.step_score import step_score


def check_readable(model) -> None:
    """Raise where a model cannot be a verifier."""
    if isinstance(model, PairModel):
        return
    if model.head is None:
        raise ValueError(
            "verifier has no score head (a plain language model?); load a process reward model, or pass load_model a "
            "HeadSpec that names rows of the language-model head"
        )
    parts = (model.head.weight, model.head.bias, model.head.inner_weight, model.head.inner_bias)
    if not all(bool(part.isfinite().all()) for part in parts if part is not None):
        raise ValueError("verifier has a score head with weights that are not finite; the checkpoint is damaged")


def check_reads(model, ids: list[int], reads: list[int], targets: list[int] | None) -> None:
    """Raise where `Engine.score` cannot read so."""
    pair = isinstance(model, PairModel)
    if pair and (targets is None or len(targets) != len(reads)):
        raise ValueError(f"targets must be the token behind each of {len(reads)} reads, got {targets}; two models compare tokens")
    if not pair and targets is not None:
        raise ValueError("targets must be None for a verifier with a score head, which reads hidden states")
    first = -1 if pair else 0
    if not reads or any(not 0 <= r < len(ids) for r in reads[1:]) or not first <= reads[0] < len(ids):
        raise ValueError(f"reads must be indices into ids ({first} .. {len(ids) - 1}), got {reads}")


def read_scores(model, hidden: Tensor, targets: list[int]) -> Tensor:
    """`[n]` float32 of hidden states `[n, dim]`, on their device, in one fused pass; NaN for a state that is not finite.

    `targets`: for a `PairModel`, the `n` tokens whose log-ratio is read.
    """
    if hidden.device.type != "cpu":  # asking which are finite would wait for the device; there the op gives NaN itself
        rows = torch.arange(len(hidden), dtype=torch.int32, device=hidden.device)
        if isinstance(model, PairModel):
            return model.log_ratio(hidden, rows, model.queue.put(torch.tensor(targets, dtype=torch.int32)))
        return _head_scores(model, hidden, rows)
    scores = torch.full((len(hidden),), float("nan"))
    rows = hidden.isfinite().all(1).nonzero()[:, 0].int()
    if not len(rows):
        return scores
    if isinstance(model, PairModel):
        scores[rows] = model.log_ratio(hidden, rows, torch.tensor(targets, dtype=torch.int32)[rows])
    else:
        scores[rows] = _head_scores(model, hidden, rows)
    return scores


def _head_scores(model, hidden: Tensor, rows: Tensor) -> Tensor:
    head = model.head
    return step_score(
        hidden, rows, head.weight, bias=head.bias, inner_weight=head.inner_weight, inner_bias=head.inner_bias,
        norm_weight=model.norm, eps=model.config.rms_eps, squash=head.squash, mix=head.mix,
    )  # fmt: skip


def flops_of_read(model, position: int) -> float:
    """Floating-point operations that a read at a position adds to its row: the last layer, and the head (of a `PairModel`
    both vocabulary heads)."""
    if isinstance(model, PairModel):
        head = 2 * model.config.hidden * model.config.vocab
    else:
        head = sum(part.numel() for part in (model.head.weight, model.head.inner_weight) if part is not None)
    return 2.0 * head + model.flops(position, 1, "hidden") - model.flops(position, 1, "kv")
