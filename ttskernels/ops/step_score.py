"""Score reasoning steps from hidden states."""

from typing import Literal

import torch
from torch import Tensor

from ttskernels._dispatch import Impl, resolve
from ttskernels._reference import step_score as reference

Squash = Literal["softmax", "sigmoid", "none"]
SQUASHES = ("softmax", "sigmoid", "none")


def step_score(
    hidden: Tensor,
    rows: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    inner_weight: Tensor | None = None,
    inner_bias: Tensor | None = None,
    squash: Squash = "softmax",
    mix: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Scores of the steps that end at `rows`: gather, RMS norm, optional inner layer with ReLU, head, squash, mix;
    one pass. `score = sum_l mix[l] * squash(logits)[l]`.

    Args:
        hidden: `[tokens, dim]`, fp32 / fp16 / bf16, before the final norm; not modified.
        rows: `[n]` int32, row of `hidden` at each step's last token.
        weight: `[labels, dim]` (`[labels, inner]` with an inner layer), any of the three dtypes.
        norm_weight: `[dim]` of the final norm; None if `hidden` is normed already.
        inner_weight: `[inner, dim]`, dtype of `weight`.
        squash: "softmax" over all labels, "sigmoid" of each logit, or "none": the logits, unbounded.
        mix: `[labels]` float32, finite: (0, 1) is the probability of label 1, (-1, 1) that minus label 0's. None: the
            head has one label and its value is the score.
    Returns:
        `[n]` float32; a row's score has the same bits in any batch. Empty `rows` gives an empty tensor.
    Raises:
        ValueError: shape or dtype mismatch, a row outside `hidden`, or hidden states or logits that are not finite.
            On a GPU values are unchecked, as that would synchronise: a score that is not finite comes back as NaN.
    Source: Lightman et al. 2023, arXiv:2305.20050.
    """
    _check(hidden, rows, weight, bias, norm_weight, inner_weight, inner_bias, squash, mix)
    chosen = resolve(impl, hidden)
    if chosen == "triton":
        from ttskernels._triton.step_score import step_score as launch

        hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
        args = (rows.contiguous(), norm_weight, eps, inner_weight, inner_bias, weight.contiguous(), bias, squash, mix)
        scores = launch(hidden, *args)
    elif chosen == "cpu":
        scores = torch.ops.ttskernels.step_score(
            hidden if hidden.stride(1) == 1 else hidden.contiguous(),
            rows.contiguous(),
            _vector(norm_weight),
            eps,
            None if inner_weight is None else inner_weight.contiguous(),
            _vector(inner_bias),
            weight.contiguous(),
            _vector(bias),
            squash,
            None if mix is None else mix.contiguous(),
        )
    else:
        args = (hidden, rows, norm_weight, eps, inner_weight, inner_bias, weight, bias, squash, mix)
        scores = reference.step_score(*args)
    if hidden.device.type != "cpu":
        return scores
    finite = scores.isfinite()
    if not finite.all():
        if mix is not None and not mix.isfinite().all():
            raise ValueError(f"mix must be finite, got {mix.tolist()}")
        i = int(finite.logical_not().nonzero()[0])
        raise ValueError(
            f"hidden row {int(rows[i])} (rows[{i}]) has no finite score: "
            "its hidden states or logits are not finite; check the model's dtype (fp16 overflows) and inputs"
        )
    return scores


def _vector(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def _check(hidden, rows, weight, bias, norm_weight, inner_weight, inner_bias, squash, mix) -> None:
    if hidden.ndim != 2 or not hidden.is_floating_point():
        raise ValueError(
            f"hidden must be floating point [tokens, dim], got {hidden.dtype} {tuple(hidden.shape)}"
        )
    if rows.ndim != 1 or rows.dtype != torch.int32:
        raise ValueError(
            f"rows must be int32 [n], got {rows.dtype} {tuple(rows.shape)}; pass rows.to(torch.int32)"
        )
    tokens, dim = hidden.shape
    if rows.device.type == "cpu" and rows.numel() and not (0 <= int(rows.min()) and int(rows.max()) < tokens):
        raise ValueError(f"rows must be in 0..{tokens - 1}, got {int(rows.min())}..{int(rows.max())}")
    width = dim
    if inner_weight is not None:
        if inner_weight.ndim != 2 or inner_weight.shape[1] != dim or inner_weight.shape[0] == 0:
            raise ValueError(f"inner_weight must be [inner, {dim}], got {tuple(inner_weight.shape)}")
        if inner_weight.dtype != weight.dtype:
            raise ValueError(
                f"inner_weight must have weight's dtype {weight.dtype}, got {inner_weight.dtype}; "
                "pass inner_weight.to(weight.dtype)"
            )
        width = inner_weight.shape[0]
    elif inner_bias is not None:
        raise ValueError("inner_bias needs inner_weight, got None")
    if weight.ndim != 2 or weight.shape[1] != width or weight.shape[0] == 0:
        raise ValueError(f"weight must be [labels, {width}], got {tuple(weight.shape)}")
    labels = weight.shape[0]
    for name, vector, size in (
        ("norm_weight", norm_weight, dim),
        ("inner_bias", inner_bias, width),
        ("bias", bias, labels),
    ):
        if vector is not None and vector.shape != (size,):
            raise ValueError(f"{name} must be [{size}], got {tuple(vector.shape)}")
    if squash not in SQUASHES:
        raise ValueError(f"squash must be one of {SQUASHES}, got {squash!r}")
    if mix is None:
        if labels != 1:
            raise ValueError(
                f"mix must be [{labels}] for a weight of {labels} labels, got None; pass how much each label counts, "
                "for example torch.tensor([0.0, 1.0]) for the probability of label 1"
            )
    elif mix.shape != (labels,) or mix.dtype != torch.float32:
        raise ValueError(f"mix must be float32 [{labels}], got {mix.dtype} {tuple(mix.shape)}")
