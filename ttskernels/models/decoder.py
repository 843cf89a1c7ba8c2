"""The decoder in readable form, over the public ops. The C++ one (native.py) has the same interface and contract."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ttskernels.kv.plan import Plan
from ttskernels.kv.pool import PagePool
from ttskernels.models.config import DecoderConfig
from ttskernels.ops.linear import linear
from ttskernels.ops.rms_norm import rms_norm
from ttskernels.ops.rope_append import rope_append
from ttskernels.ops.sample import sample
from ttskernels.ops.tree_attention import tree_attention


class Decoder(Protocol):
    """What `Model` runs; it has checked every argument. See `Model.forward` and `Model.decode`."""

    def forward(self, ids: Tensor, plan: Plan, pool: PagePool, out_rows: Tensor, output: str) -> Tensor: ...

    def decode(
        self,
        ids: Tensor,
        plan: Plan,
        pool: PagePool,
        keys: Tensor,
        params: Tensor,
        next_state: Tensor,
        states: Tensor,
        tokens: Tensor,
        logprobs: Tensor,
    ) -> int: ...


class PythonDecoder:
    """Runs layer by layer through `ops`; every op gets the same `impl`."""

    def __init__(self, config: DecoderConfig, weights: dict[str, Tensor], impl: str):
        self.config, self.weights, self.impl = config, weights, impl

    def forward(self, ids: Tensor, plan: Plan, pool: PagePool, out_rows: Tensor, output: str) -> Tensor:
        out_rows = out_rows.long()
        x = self.weights["model.embed_tokens.weight"][ids.long()]
        for layer in range(self.config.layers):
            attended = self._attention(layer, x, plan, pool)
            if layer == self.config.layers - 1:  # nothing reads the other rows any more: their K, V are written
                x, attended = x[out_rows], attended[out_rows]
            x = x + self._linear(layer, "self_attn.o_proj", attended)
            x = x + self._mlp(layer, x)
        if output == "hidden":
            return x.float()
        x = rms_norm(x, self.weights["model.norm.weight"], self.config.rms_eps, impl=self.impl)
        lm_head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        return linear(x, lm_head, impl=self.impl).float()

    def decode(self, ids, plan, pool, keys, params, next_state, states, tokens, logprobs) -> int:
        rows = torch.arange(plan.num_rows, dtype=torch.int32)
        for iteration in range(tokens.shape[0]):
            if iteration and not plan.advance():
                return iteration
            logits = self.forward(ids, plan, pool, rows, "logits")
            token, logprob = sample(logits, rows, keys, plan.row_pos + 1, params, impl=self.impl)
            tokens[iteration], logprobs[iteration] = token, logprob
            ids.copy_(token)
            states.copy_(next_state[states.long(), token.long()])
            if (states < 0).any():
                return iteration + 1
        return tokens.shape[0]

    def _attention(self, layer: int, x: Tensor, plan: Plan, pool: PagePool) -> Tensor:
        """Heads of every row `[rows, q_heads * head_dim]`, after writing the layer's K, V of new rows."""
        c, impl = self.config, self.impl
        x = rms_norm(x, self._weight(layer, "input_layernorm.weight"), c.rms_eps, impl=impl)
        q = self._linear(layer, "self_attn.q_proj", x).view(-1, c.q_heads, c.head_dim)
        k = self._linear(layer, "self_attn.k_proj", x).view(-1, c.kv_heads, c.head_dim)
        v = self._linear(layer, "self_attn.v_proj", x).view(-1, c.kv_heads, c.head_dim)
        q = rope_append(
            q, k, v, c.inv_freq, plan.row_pos, plan.row_slot, pool.k[layer], pool.v[layer],
            rope_scale=c.rope_scale,
            q_norm=self._optional(layer, "self_attn.q_norm.weight"),
            k_norm=self._optional(layer, "self_attn.k_norm.weight"),
            eps=c.rms_eps,
            impl=impl,
        )  # fmt: skip
        out, _ = tree_attention(q, pool.k[layer], pool.v[layer], plan, scale=c.scale, window=c.window, impl=impl)
        return out.flatten(1)

    def _mlp(self, layer: int, x: Tensor) -> Tensor:
        x = rms_norm(x, self._weight(layer, "post_attention_layernorm.weight"), self.config.rms_eps, impl=self.impl)
        gate, up = self._linear(layer, "mlp.gate_proj", x), self._linear(layer, "mlp.up_proj", x)
        return self._linear(layer, "mlp.down_proj", torch.nn.functional.silu(gate) * up)

    def _linear(self, layer: int, name: str, x: Tensor) -> Tensor:
        return linear(x, self._weight(layer, f"{name}.weight"), self._optional(layer, f"{name}.bias"), impl=self.impl)

    def _weight(self, layer: int, name: str) -> Tensor:
        return self.weights[f"model.layers.{layer}.{name}"]

    def _optional(self, layer: int, name: str) -> Tensor | None:
        return self.weights.get(f"model.layers.{layer}.{name}")
