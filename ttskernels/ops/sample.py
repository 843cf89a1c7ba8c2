"""Seeded sampling: one token and its log-probability per row."""

import torch
from torch import Tensor

from ttskernels._dispatch import Impl, resolve
from ttskernels._reference import sample as reference
from ttskernels.errors import BadLogitsError


def _check(logits: Tensor, rows: Tensor, keys: Tensor, positions: Tensor, params: Tensor) -> None:
    if logits.ndim != 2 or logits.shape[1] == 0 or logits.dtype != torch.float32:
        raise ValueError(f"logits must be float32 [*, vocab], got {logits.dtype} {tuple(logits.shape)}")
    count = rows.numel()
    for name, t, dtype, shape in (
        ("rows", rows, torch.int32, (count,)),
        ("keys", keys, torch.int64, (count,)),
        ("positions", positions, torch.int32, (count,)),
        ("params", params, torch.float32, (count, 4)),
    ):
        if t.dtype != dtype or t.shape != shape:
            raise ValueError(f"{name} must be {dtype} {shape}, got {t.dtype} {tuple(t.shape)}; pass {name}.to({dtype})")
        if t.device != logits.device:
            raise ValueError(f"{name} must be on the device of logits, {logits.device}, got {t.device}")
    if logits.device.type == "cpu" and count and not (0 <= int(rows.min()) and int(rows.max()) < logits.shape[0]):
        raise ValueError(
            f"rows must be in [0, {logits.shape[0]}) of logits, got {int(rows.min())} .. {int(rows.max())}"
        )


def check_params(params: Tensor) -> None:
    """Raise ValueError unless every row is a valid temperature, top_k, top_p, min_p."""
    temperature, top_k, top_p, min_p = params.unbind(-1)
    for name, good, rule in (
        ("temperature", (temperature >= 0) & temperature.isfinite(), "finite and not negative"),
        ("top_k", top_k >= 0, "not negative (0: off)"),
        ("top_p", (top_p > 0) & (top_p <= 1), "in (0, 1] (1: off)"),
        ("min_p", (min_p >= 0) & (min_p <= 1), "in [0, 1] (0: off)"),
    ):
        if not bool(good.all()):
            row = int((~good).nonzero()[0])
            raise ValueError(f"params[{row}]: {name} must be {rule}, got {params[row].tolist()}")


def sample(
    logits: Tensor, rows: Tensor, keys: Tensor, positions: Tensor, params: Tensor, *, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """Draw one token per entry of `rows`; the draw depends on the key, the position and the row's logits alone.

    Args:
        logits: `[*, vocab]` float32, every value finite; not modified.
        rows: `[S]` int32, row of `logits` of each draw (one row may serve several).
        keys: `[S]` int64 path keys; with `positions` `[S]` int32 (of the sampled tokens) they seed Philox4x32-10.
        params: `[S, 4]` float32: temperature (0: the largest logit, ties to the smallest id), top_k (0: off),
            top_p (1: off), min_p (0: off), applied in this order.
    Returns:
        tokens `[S]` int32 and logprobs `[S]` float32 under the tempered, unfiltered distribution (temperature 0: of
        temperature 1).
    Raises:
        ValueError: shape, dtype or device mismatch, an index or parameter out of range, a non-finite logit. On a GPU
            values are unchecked, as that would synchronise: a row that is not finite gives token -1 and NaN.
    Source: Salmon et al. 2011 (Philox).
    """
    _check(logits, rows, keys, positions, params)
    if logits.device.type == "cpu":
        check_params(params)
    chosen = resolve(impl, logits)
    if chosen == "triton":
        from ttskernels._triton.sample import sample as launch

        tokens, logprobs = launch(logits, rows, keys, positions, params)
    elif chosen == "cpu":
        args = (rows, keys, positions, params)
        tokens, logprobs = torch.ops.ttskernels.sample(logits.contiguous(), *(a.contiguous() for a in args))
    else:
        tokens, logprobs = reference.sample(logits, rows, keys, positions, params)
    if logits.device.type == "cpu":
        check_tokens(tokens, rows)
    return tokens, logprobs


def check_tokens(tokens: Tensor, rows: Tensor) -> None:
    """Raise BadLogitsError for the first token that is none."""
    if bool((tokens < 0).any()):
        bad = int(rows[int((tokens < 0).nonzero()[0])])
        raise BadLogitsError(f"logits must be finite, row {bad} has a NaN or an infinite value", bad)
