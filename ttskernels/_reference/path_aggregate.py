"""Reference of path_aggregate: a loop over scores in state's dtype."""

import torch
from torch import Tensor


def path_aggregate(state: Tensor, scores: Tensor, indptr: Tensor) -> Tensor:
    out = state.clone()
    bounds = indptr.tolist()
    for path in range(len(out)):
        for score in scores[bounds[path] : bounds[path + 1]].to(state.dtype):
            count, least, _, total, log_product = out[path]
            out[path] = torch.stack(
                [count + 1, torch.minimum(least, score), score, total + score, log_product + score.log()]
            )
    return out
