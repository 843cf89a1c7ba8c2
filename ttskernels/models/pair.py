"""Two language models of one shape over one forest: what an implicit process reward model is made of.

Its value is log pi(token) - log pi_ref(token), summed over a solution (Yuan et al. 2024, arXiv:2412.01981). Both models
read the same tokens, so one node has the KV of both (a pool of twice the layers), and one plan serves both forwards.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ttskernels import _dispatch
from ttskernels.kv.plan import Plan
from ttskernels.kv.plan_layout import HeadShape
from ttskernels.kv.pool import ByteBudget, PagePool
from ttskernels.models.config import FlopsOutput
from ttskernels.models.device import check_device
from ttskernels.models.loading import Checkpoint, load_checkpoint
from ttskernels.models.model import Kv, Model, Weights, check_impl, make_decoder, with_kv
from ttskernels.ops.token_logprob import token_logprob

SHAPE = ("vocab", "layers", "hidden", "q_heads", "kv_heads", "head_dim", "dtype", "kv_form")


@dataclass(frozen=True)
class PoolHalf:
    """Some layers of a pool, as `Model.forward` reads and writes them."""

    k: Tensor
    v: Tensor
    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    form: str

    @classmethod
    def of(cls, pool: PagePool, first: int, layers: int) -> PoolHalf:
        chosen = slice(first, first + layers)
        return cls(pool.k[chosen], pool.v[chosen], layers, pool.kv_heads, pool.head_dim, pool.dtype, pool.form)


class PairModel:
    """`first` and `second` side by side, where an engine takes one verifier. It has no score head: it compares tokens.

    Raises:
        ValueError: the models differ in shape or vocabulary, so that they cannot share nodes; or one is no language model.
    """

    head = None

    def __init__(self, first: Model, second: Model):
        for name, model in (("first", first), ("second", second)):
            if model.lm_head is None:
                raise ValueError(f"{name} must be a language model with its vocabulary head, got one with a score head")
        for field in SHAPE:
            a, b = getattr(first.config, field), getattr(second.config, field)
            if a != b:
                raise ValueError(
                    f"two models over one forest must have the same {', '.join(SHAPE)}; {field} is {a} in the first and {b} "
                    "in the second; pass the very reference model that the implicit PRM was trained against"
                )
        self.first, self.second = first, second
        if first.device != second.device:
            raise ValueError(f"two models over one forest must be on one device, got {first.device} and {second.device}")
        second.share_queue(first)
        self.machine, self.queue, self.reserves_pool = first.machine, first.queue, first.reserves_pool
        limit = min(first.config.max_positions, second.config.max_positions)
        self.config = replace(first.config, max_positions=limit)  # of one of them; the pool has both

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.config.kv_bytes_per_token

    @property
    def heads(self) -> HeadShape:
        return self.config.heads

    def flops(self, first: int, rows: int = 1, output: FlopsOutput = "hidden") -> float:
        """Of both; see `DecoderConfig.flops`."""
        return sum(model.config.flops(first, rows, output) for model in (self.first, self.second))

    def new_pool(self, num_pages: int, budget: ByteBudget | None = None) -> PagePool:
        return self.first.new_pool(num_pages, budget, models=2)

    def forget_pool(self, pool: PagePool) -> None:
        """See `Model.forget_pool`."""
        self.first.forget_pool(pool)

    def forward(self, ids: Tensor, plan: Plan, pool: PagePool, out_rows: Tensor, output: str = "hidden") -> Tensor:
        """`Model.forward` of both, each into its half of the pool: `[n, 2 * hidden]` float32, the first model's first."""
        if output != "hidden":
            raise ValueError(f"output must be 'hidden' for two models, got {output!r}")
        layers = self.config.layers
        states = [
            model.forward(ids, plan, PoolHalf.of(pool, i * layers, layers), out_rows, "hidden")
            for i, model in enumerate((self.first, self.second))
        ]
        return torch.cat(states, 1)

    def log_ratio(self, hidden: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """log p_first(ids) - log p_second(ids) of the token behind each row.

        Args:
            hidden: `[tokens, 2 * hidden]` float32, of `forward`. rows, ids: `[n]` int32.
        Returns:
            `[n]` float32; a row's value does not depend on the others.
        """
        halves = hidden.split(self.config.hidden, 1)
        first, second = (
            token_logprob(half, rows, model.lm_head, ids, norm_weight=model.norm, eps=model.config.rms_eps, impl=model.impl)
            for half, model in zip(halves, (self.first, self.second), strict=True)
        )
        return first - second


def load_pair(
    first: str | os.PathLike,
    second: str | os.PathLike,
    dtype: torch.dtype = torch.bfloat16,
    impl: _dispatch.Impl = "auto",
    *,
    device: str | torch.device = "cpu",
    weights: Weights = "auto",
    kv: Kv = "auto",
) -> PairModel:
    """Load two language models of one shape; arguments and errors as `load_model`."""
    where, impl = check_device(device, impl)
    check_impl(impl)
    checkpoints = [with_kv(load_checkpoint(source, dtype), kv, impl, where) for source in (first, second)]
    models = [_language_model(c, s, impl, where, weights) for c, s in zip(checkpoints, (first, second), strict=True)]
    return PairModel(*models)


def _language_model(
    checkpoint: Checkpoint, source: str | os.PathLike, impl: str, device: torch.device, weights: Weights
) -> Model:
    if not checkpoint.keeps_lm_head:
        raise ValueError(f"{source} has a score head; an implicit PRM is made of two plain language models")
    needed = impl == "triton"  # elsewhere token_logprob reads the plain vocabulary head, and the decoder needs no copy
    return Model(checkpoint, *make_decoder(checkpoint, impl, lm_head=needed, device=device, weights=weights))
