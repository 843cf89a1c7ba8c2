"""The layers of a decoder on a GPU, as launches: with the vendor's products, or, for few rows, with ours.

Ours fuse what surrounds a product (seven launches a layer besides attention's, where there were eight), and each begins to
read its weights while the launch in front still runs.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ttskernels.kv.pool import PagePool
from ttskernels.ops.linear import gated_linear, linear_parts
from ttskernels.ops.rms_norm import add_rms_norm, rms_norm
from ttskernels.ops.rope_append import rope_append
from ttskernels.ops.silu_mul import silu_mul
from ttskernels.ops.tree_attention import tree_attention

if TYPE_CHECKING:
    from ttskernels.models.device_decoder import DeviceDecoder


def turned(
    decoder: DeviceDecoder, layer: int, qkv: Tensor, bias: Tensor | None, fields: SimpleNamespace, pool: PagePool
) -> Tensor:
    """q of `qkv` `[..., rows, q, k and v]`, turned; k and v go into the pool."""
    c, w = decoder.config, decoder.layers[layer]
    widths = [n * c.head_dim for n in (c.q_heads, c.kv_heads, c.kv_heads)]
    q, k, v = (part.unflatten(-1, (-1, c.head_dim)) for part in qkv.split(widths, -1))
    return rope_append(
        q, k, v, decoder.inv_freq, fields.positions, fields.slots, pool.k[layer], pool.v[layer], bias=bias,
        rope_scale=c.rope_scale, q_norm=w.q_norm, k_norm=w.k_norm, eps=c.rms_eps, out_dtype=c.dtype, impl="triton",
    )  # fmt: skip


def vendor_layers(
    decoder: DeviceDecoder, x: Tensor, fields: SimpleNamespace, plan, pool: PagePool, cut: tuple | None = None
) -> Tensor:
    """Hidden states `[rows, hidden]` behind the last layer. `cut`: (plan, rows) that alone go through its second half."""
    c = decoder.config
    for i, w in enumerate(decoder.layers):
        qkv = torch.nn.functional.linear(rms_norm(x, w.input_norm, c.rms_eps, impl="triton"), w.qkv, w.qkv_bias)
        q = turned(decoder, i, qkv, None, fields, pool)
        if cut is not None and w is decoder.layers[-1]:
            plan, chosen = cut
            q, x = q.index_select(0, chosen), x.index_select(0, chosen)
        seen = tree_attention(q, pool.k[i], pool.v[i], plan, scale=c.scale, window=c.window, impl="triton")
        x.addmm_(seen.flatten(1), w.o.T)  # the residual is added by the product itself
        if w.o_bias is not None:
            x += w.o_bias
        gate, up = (rms_norm(x, w.post_norm, c.rms_eps, impl="triton") @ w.gate_up.T).chunk(2, 1)
        x.addmm_(silu_mul(gate, up, impl="triton"), w.down.T)
    return x


def own_layers(decoder: DeviceDecoder, x: Tensor, fields: SimpleNamespace, plan, pool: PagePool) -> Tensor:
    """The same for few rows."""
    c, layers = decoder.config, decoder.layers
    normed = rms_norm(x, layers[0].input_norm, c.rms_eps, impl="triton")
    for i, w in enumerate(layers):
        q = turned(decoder, i, linear_parts(normed, w.qkv, impl="triton"), w.qkv_bias, fields, pool)
        seen = tree_attention(q, pool.k[i], pool.v[i], plan, scale=c.scale, window=c.window, impl="triton")
        parts = linear_parts(seen.flatten(1), w.o, impl="triton")
        normed = add_rms_norm(parts, x, w.post_norm, c.rms_eps, bias=w.o_bias, impl="triton")
        parts = linear_parts(gated_linear(normed, w.gate_up, impl="triton"), w.down, impl="triton")
        following = layers[i + 1].input_norm if i + 1 < len(layers) else decoder.norm
        normed = add_rms_norm(parts, x, following, c.rms_eps, impl="triton")
    return x
