"""Schemas and fake kernels of every op, once. C++ only adds implementations (csrc/bind); no backend is imported here."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils import _pytree

from ttskernels._reference.linear import group_size

_LIB = torch.library.Library("ttskernels", "FRAGMENT")  # keeps the definitions alive


def _define(schema: str):
    """Define an op; decorates its fake kernel. That one also runs, and would return memory that nobody wrote, where only some
    tensors are on "meta": a parameter that was never loaded."""
    name = schema.split("(")[0]
    _LIB.define(schema)

    def register(fake):
        @functools.wraps(fake)
        def checked(*args, **kwargs):
            devices = {t.device for t in _pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            if len(devices) > 1:
                raise ValueError(f"tensors of {name} must be on one device, got {sorted(map(str, devices))}; move or load them")
            return fake(*args, **kwargs)

        return torch.library.register_fake(f"ttskernels::{name}", checked, lib=_LIB)

    return register


@_define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@_define("linear_pack(Tensor weight, int form=0, Tensor? scales=None) -> Tensor")
def _(weight: Tensor, form: int = 0, scales: Tensor | None = None) -> Tensor:
    n, k = weight.shape
    if form:  # blocks of 64 columns and a group of inputs, with a float32 scale a column
        group = group_size(k, "int16" if form == 1 else "int8")
        size = ((n + 63) // 64) * (-(-k // group)) * 64 * (4 + group * (2 if form == 1 else 1))
        return weight.new_empty(size, dtype=torch.uint8)
    panels, pairs = (n + 63) // 64, (k + 1) // 2
    size = panels * (pairs * 2 if weight.dtype == torch.bfloat16 else k) * 64 * weight.element_size()
    return weight.new_empty(size, dtype=torch.uint8)


@_define("linear(Tensor x, Tensor packed, int out_features, Tensor? bias, int form=0) -> Tensor")
def _(x: Tensor, packed: Tensor, out_features: int, bias: Tensor | None, form: int = 0) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@_define("refine_logits(Tensor(a!) logits, Tensor x, Tensor weight) -> ()")
def _(logits: Tensor, x: Tensor, weight: Tensor) -> None:
    pass


@_define(
    "rope_append(Tensor q, Tensor k, Tensor v, Tensor inv_freq, float rope_scale, Tensor positions, Tensor slots, "
    "Tensor? q_norm, Tensor? k_norm, float eps, Tensor(a!) k_pages, Tensor(b!) v_pages) -> Tensor"
)
def _(q, k, v, inv_freq, rope_scale, positions, slots, q_norm, k_norm, eps, k_pages, v_pages) -> Tensor:
    return q.new_empty(q.shape, dtype=k_pages.dtype if k_pages.is_floating_point() else q.dtype)


@_define(
    "tree_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor plan, float scale, float softcap, int window, "
    "Tensor? sinks, Tensor(a!) out) -> Tensor"
)
def _(q, k_pages, v_pages, plan, scale, softcap, window, sinks, out) -> Tensor:
    return q.new_empty(q.shape[:2], dtype=torch.float32)


@_define("sample(Tensor logits, Tensor rows, Tensor keys, Tensor positions, Tensor params) -> (Tensor, Tensor)")
def _(logits, rows, keys, positions, params) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), logits.new_empty(rows.shape, dtype=torch.float32)


@_define(
    "step_score(Tensor hidden, Tensor rows, Tensor? norm_weight, float eps, Tensor? inner_weight, Tensor? inner_bias, "
    "Tensor weight, Tensor? bias, str squash, Tensor? mix) -> Tensor"
)
def _(hidden, rows, norm_weight, eps, inner_weight, inner_bias, weight, bias, squash, mix) -> Tensor:
    return hidden.new_empty(rows.shape[0], dtype=torch.float32)


@_define(
    "token_logprob(Tensor hidden, Tensor rows, Tensor? norm_weight, float eps, Tensor lm_head, int vocab, "
    "ScalarType dtype, Tensor ids) -> Tensor"
)
def _(hidden, rows, norm_weight, eps, lm_head, vocab, dtype, ids) -> Tensor:
    return hidden.new_empty(rows.shape[0], dtype=torch.float32)


@_define("path_aggregate(Tensor state, Tensor scores, Tensor indptr) -> Tensor")
def _(state, scores, indptr) -> Tensor:
    return torch.empty_like(state)


@_define("decoder_create(int[] config, float[] constants, Tensor inv_freq, Tensor?[] weights) -> int")
def _(config, constants, inv_freq, weights) -> int:
    return 0


@_define(
    "decoder_forward(int handle, Tensor(a!) k_pool, Tensor(b!) v_pool, Tensor plan, Tensor ids, Tensor out_rows, "
    "int output, int width, Tensor? out_plan=None) -> Tensor"
)
def _(handle, k_pool, v_pool, plan, ids, out_rows, output, width, out_plan=None) -> Tensor:
    return k_pool.new_empty(out_rows.shape[0], width, dtype=torch.float32)


@_define(
    "decoder_decode(int handle, Tensor(a!) k_pool, Tensor(b!) v_pool, Tensor(c!) plan, Tensor(d!) ids, Tensor keys, "
    "Tensor params, Tensor next_state, Tensor(e!) states, Tensor(f!) tokens, Tensor(g!) logprobs) -> Tensor"
)
def _(handle, k_pool, v_pool, plan, ids, keys, params, next_state, states, tokens, logprobs) -> Tensor:
    return ids.new_empty((), dtype=torch.int32)  # iterations done
