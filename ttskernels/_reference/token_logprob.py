"""Reference of token_logprob: float32 (float64 for float64 input) arithmetic, one tile of the vocabulary at a time."""

import torch
from torch import Tensor

TILE = 4096  # vocabulary rows


def token_logprob(
    hidden: Tensor, rows: Tensor, norm_weight: Tensor | None, eps: float, lm_head: Tensor, ids: Tensor
) -> Tensor:
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    x = hidden[rows.long()].to(wide)
    if norm_weight is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm_weight.to(wide)
    lse = x.new_full((len(x),), float("-inf"))
    for tile in lm_head.split(TILE):
        lse = torch.logaddexp(lse, torch.logsumexp(x @ tile.to(wide).T, -1))
    logprobs = (x * lm_head[ids.long()].to(wide)).sum(-1) - lse
    return logprobs.where(logprobs.isfinite(), float("nan"))
