"""Tree attention inside of transformers' own modules: the attention function "ttsk_tree", and the run that it serves.

A forward has one row of tokens of any branches; whoever runs it has set what `RUN` holds, on the same thread.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ttskernels.kv.pool import PagePool
from ttskernels.ops.rope_append import rope_append
from ttskernels.ops.tree_attention import tree_attention

NAME = "ttsk_tree"
# (layer, q [rows, q_heads, dim], k and v [rows, kv_heads, dim or v_dim], scale, window, softcap, sinks) -> [rows, q_heads, v_dim]
Run = Callable[[int, Tensor, Tensor, Tensor, float, int, float, Tensor | None], Tensor]
RUN: ContextVar[Run | None] = ContextVar("RUN", default=None)


def register() -> None:
    """Makes "ttsk_tree" known to transformers. It gets no mask function, so that transformers makes no mask for it."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)


@contextmanager
def running(run: Run):
    """Forwards inside go to `run`."""
    token = RUN.set(run)
    try:
        yield run
    finally:
        RUN.reset(token)


def attend(
    module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, sliding_window=None, softcap=None, s_aux=None, **_
):
    """transformers' attention interface: q `[1, q_heads, rows, dim]`, k, v `[1, kv_heads, rows, dim]`, already turned."""
    run = RUN.get()
    if run is None:
        raise RuntimeError(
            f'attention "{NAME}" runs inside a model of ttskernels (integrations.transformers.as_model); to use this one by '
            'itself again, call set_attn_implementation("sdpa") on it'
        )
    if len(query) != 1:
        raise ValueError(f"a forward with tree attention has one row of tokens, got a batch of {len(query)}")
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    scale = q.shape[2] ** -0.5 if scaling is None else float(scaling)
    sinks = None if s_aux is None else s_aux.float()
    out = run(module.layer_idx, q, k, v, scale, sliding_window or 0, softcap or 0.0, sinks)
    return out.contiguous()[None], None


class PagedRun:
    """Writes k and v of every row into its slot, and attends to the pages of its path. Heads narrower than the pool's are
    filled up with zeros, which change no product."""

    def __init__(self, pool: PagePool, plan, positions: Tensor, slots: Tensor, impl: str):
        self.pool, self.plan, self.positions, self.slots, self.impl = pool, plan, positions, slots, impl
        self.no_turn = torch.empty(0, device=slots.device)

    def __call__(self, layer, q, k, v, scale, window, softcap, sinks) -> Tensor:
        width, v_dim = self.pool.head_dim, v.shape[2]
        q, k, v = (t if t.shape[2] == width else pad(t, (0, width - t.shape[2])) for t in (q, k, v))
        pages = self.pool.k[layer], self.pool.v[layer]
        nothing = k.new_empty(len(k), 0, width)
        rope_append(nothing, k, v, self.no_turn, self.positions, self.slots, *pages, impl=self.impl)
        out = tree_attention(q, *pages, self.plan, scale=scale, window=window, softcap=softcap, sinks=sinks, impl=self.impl)
        return out[..., :v_dim]
