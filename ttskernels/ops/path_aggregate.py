"""Running path scores: min, last, mean and product of step scores, folded as steps end."""

from typing import Literal

import torch
from torch import Tensor

from ttskernels._dispatch import Impl, resolve
from ttskernels._reference import path_aggregate as reference

How = Literal["min", "last", "mean", "product"]
HOWS = ("min", "last", "mean", "product")


def empty_state(paths: int, device: str | torch.device = "cpu") -> Tensor:
    """`[paths, 5]` float32 state of paths without steps: count 0, min inf, last NaN, sum 0, log-product 0."""
    row = torch.tensor([0.0, float("inf"), float("nan"), 0.0, 0.0], device=device)
    return row.repeat(paths, 1)


def path_aggregate(state: Tensor, scores: Tensor, indptr: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Fold new step scores into each path's (count, min, last, sum, log-product).

    Args:
        state: `[paths, 5]` float32, from `empty_state` or an earlier call; not modified. Indexing it with the
            parents of forked paths gives the children's state.
        scores: `[n]` float32, the new scores of path p at `indptr[p] : indptr[p + 1]`, in step order.
        indptr: `[paths + 1]` int32, from 0 to n.
    Returns:
        The new state; the same bits however the scores are cut into calls.
    Raises:
        ValueError: shape or dtype mismatch, or indptr that does not rise from 0 to n (unchecked on a GPU: that would
            synchronise).

    Scores may be unbounded. A zero makes the log-product -inf (product 0); a negative one makes it NaN, which
    only `aggregate(state, "product")` shows: products are for scores in [0, 1].
    """
    if state.ndim != 2 or state.shape[1] != 5 or state.dtype != torch.float32:
        raise ValueError(
            f"state must be float32 [paths, 5], got {state.dtype} {tuple(state.shape)}; see empty_state"
        )
    if scores.ndim != 1 or scores.dtype != torch.float32:
        raise ValueError(
            f"scores must be float32 [n], got {scores.dtype} {tuple(scores.shape)}; pass scores.float()"
        )
    if indptr.shape != (len(state) + 1,) or indptr.dtype != torch.int32:
        raise ValueError(f"indptr must be int32 [{len(state) + 1}], got {indptr.dtype} {tuple(indptr.shape)}")
    if indptr.device.type == "cpu":
        bounds = indptr.tolist()
        if (
            bounds[0] != 0
            or bounds[-1] != len(scores)
            or any(a > b for a, b in zip(bounds, bounds[1:], strict=False))
        ):
            raise ValueError(f"indptr must rise from 0 to {len(scores)}, the number of scores")
    chosen = resolve(impl, state)
    if chosen == "triton":
        from ttskernels._triton.path_aggregate import path_aggregate as launch

        return launch(state, scores, indptr.contiguous())
    if chosen == "cpu":
        return torch.ops.ttskernels.path_aggregate(
            state.contiguous(), scores.contiguous(), indptr.contiguous()
        )
    return reference.path_aggregate(state, scores, indptr)


def aggregate(state: Tensor, how: How) -> Tensor:
    """`[paths]` path scores from a state; NaN for a path without steps (and, for "product", with a negative
    score)."""
    if how not in HOWS:
        raise ValueError(f"how must be one of {HOWS}, got {how!r}")
    count, least, last, total, log_product = state.unbind(-1)
    value = {"min": least, "last": last, "mean": total / count, "product": log_product.exp()}[how]
    return torch.where(count > 0, value, float("nan"))
