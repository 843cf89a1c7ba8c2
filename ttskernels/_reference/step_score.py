"""Reference of step_score: float32 (float64 for float64 input) arithmetic, float32 (float64) scores."""

import torch
from torch import Tensor


def step_score(
    hidden: Tensor,
    rows: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    inner_weight: Tensor | None,
    inner_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    squash: str,
    mix: Tensor | None,
) -> Tensor:
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    x = hidden[rows.long()].to(wide)
    bad = ~x.isfinite().all(-1)
    if norm_weight is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm_weight.to(wide)
    if inner_weight is not None:
        x = x @ inner_weight.to(wide).T
        x = torch.relu(x if inner_bias is None else x + inner_bias.to(wide))
    logits = x @ weight.to(wide).T
    if bias is not None:
        logits = logits + bias.to(wide)
    bad = bad | ~logits.isfinite().all(-1)
    total = 1.0
    if squash == "softmax":
        logits = (logits - logits.amax(-1, keepdim=True)).exp()
        total = logits.sum(-1)
    elif squash == "sigmoid":
        logits = torch.sigmoid(logits)
    scores = logits.sum(-1) if mix is None else (logits * mix.to(wide)).sum(-1)
    scores = scores / total  # at the end: a mix within [0, 1] gives no score above 1
    return scores.masked_fill(bad, float("nan"))
