"""Reference of refine_logits: row by row, the largest logits as dot products in float32 (float64 for float64)."""

import torch
from torch import Tensor

REACH, MOST = 3.0, 16


def refine_logits(logits: Tensor, x: Tensor, weight: Tensor) -> None:
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    for row, some_x in zip(logits, x.to(wide), strict=True):
        if not row.isfinite().all():
            continue
        ids = row.argsort(descending=True, stable=True)[:MOST]
        ids = ids[row[ids] >= row.max() - REACH]
        row[ids] = weight[ids].to(wide) @ some_x
