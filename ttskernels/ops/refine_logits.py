"""The likeliest tokens' logits once more, from the vocabulary's own rows: what int8 weights lack."""

import torch
from torch import Tensor

from ttskernels._dispatch import Impl, resolve
from ttskernels._reference import refine_logits as reference
from ttskernels.ops.linear import DTYPES


def refine_logits(logits: Tensor, x: Tensor, weight: Tensor, *, impl: Impl = "auto") -> None:
    """Replace each row's largest logits by `weight[token] @ x[row]`, in place.

    Those at most 3 below the row's largest, of more than 16 the largest ones (of equal ones the first). int8 weights and inputs
    err by a few hundredths, which decides among these and hardly matters elsewhere; a row needs 16 of the vocabulary's rows at
    most. A row with a logit that is not finite stays as it is. On a GPU it is the reference.

    Args:
        logits: `[rows, vocab]` float32, contiguous; modified.
        x: `[rows, dim]`, any floating dtype: what they were computed from.
        weight: `[vocab, dim]`, fp32 / fp16 / bf16.
    Raises:
        ValueError: shape or dtype mismatch.
    """
    if logits.ndim != 2 or not logits.shape[1] or logits.dtype != torch.float32 or not logits.is_contiguous():
        raise ValueError(f"logits must be contiguous float32 [rows, vocab], got {logits.dtype} {tuple(logits.shape)}")
    if weight.ndim != 2 or len(weight) != logits.shape[1] or weight.dtype not in DTYPES:
        raise ValueError(
            f"weight must be float32, float16 or bfloat16 [{logits.shape[1]}, dim], got {weight.dtype} {tuple(weight.shape)}"
        )
    if x.shape != (len(logits), weight.shape[1]) or not x.is_floating_point():
        raise ValueError(f"x must be [{len(logits)}, {weight.shape[1]}] of a floating dtype, got {x.dtype} {tuple(x.shape)}")
    if resolve(impl, logits) == "cpu":
        torch.ops.ttskernels.refine_logits(logits, x.float().contiguous(), weight.contiguous())
    else:
        reference.refine_logits(logits, x, weight)
