"""The decoder in readable form, over the public ops. The C++ one (native.py) has the same interface and contract."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from ttskernels.kv.plan import Plan
from ttskernels.kv.pool import PagePool
from ttskernels.models.config import DecoderConfig
from ttskernels.ops.linear import Form, Rounded, linear, linear_pack
from ttskernels.ops.refine_logits import refine_logits
from ttskernels.ops.rms_norm import rms_norm
from ttskernels.ops.rope_append import rope_append
from ttskernels.ops.sample import check_tokens, sample
from ttskernels.ops.silu_mul import silu_mul
from ttskernels.ops.tree_attention import tree_attention

LM_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Forms:
    """How a decoder keeps its matrices, see `linear_pack`."""

    most: Form
    kv: Form  # k and v
    down: Form

    def of(self, name: str) -> Form:
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            return self.kv
        return self.down if name.endswith("down_proj.weight") else self.most


FLOAT = Forms("float", "float", "float")
CALIBRATED = Forms("int8", "int8", "int8")  # of weights that were rounded for their inputs
NONE_ROUNDED: Mapping[str, Rounded] = MappingProxyType({})


class Decoder(Protocol):
    """What `Model` runs; it has checked every argument. See `Model.forward` and `Model.decode`."""

    def forward(
        self, ids: Tensor, plan: Plan, pool: PagePool, out_plan: Plan | None, out_rows: Tensor, output: str
    ) -> Tensor:
        """`out_plan`: a plan of `out_rows` alone, for the last layer; None: `out_rows` are all rows, in order."""
        ...

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


class SteppedDecoder:
    """Decodes by one `forward` and one `sample` after the other."""

    impl: str

    def decode(self, ids, plan, pool, keys, params, next_state, states, tokens, logprobs) -> int:
        rows = torch.arange(plan.num_rows, dtype=torch.int32)
        for iteration in range(tokens.shape[0]):
            if iteration and not plan.advance():
                return iteration
            logits = self.forward(ids, plan, pool, None, rows, "logits")
            arguments = (t.to(logits.device) for t in (rows, keys, plan.positions + 1, params))
            token, logprob = (t.cpu() for t in sample(logits, *arguments, impl=self.impl))
            check_tokens(token, rows)
            tokens[iteration], logprobs[iteration] = token, logprob
            ids.copy_(token)
            states.copy_(next_state[states.long(), token.long()])
            if (states < 0).any():
                return iteration + 1
        return tokens.shape[0]


class PythonDecoder(SteppedDecoder):
    """Runs layer by layer through `ops`; every op gets the same `impl`. `rounded`: int8 matrices that are rounded already."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: dict[str, Tensor],
        impl: str,
        lm_head: bool = True,
        forms: Forms = FLOAT,
        rounded: Mapping[str, Rounded] = NONE_ROUNDED,
    ):
        self.config, self.impl = config, impl
        self.embed = weights["model.embed_tokens.weight"]
        matrices = {name: tensor for name, tensor in weights.items() if name.endswith("_proj.weight")}
        if lm_head:
            matrices[LM_HEAD] = weights.get(LM_HEAD, self.embed)
        self.refine = matrices.get(LM_HEAD) if forms.most == "int8" else None
        matrices |= {name: rounded[name] for name in matrices if name in rounded}
        self.packed = {name: linear_pack(tensor, form=forms.of(name), impl=impl) for name, tensor in matrices.items()}
        self.vectors = {name: tensor for name, tensor in weights.items() if tensor.ndim == 1}

    def forward(
        self, ids: Tensor, plan: Plan, pool: PagePool, out_plan: Plan | None, out_rows: Tensor, output: str
    ) -> Tensor:
        x, last = self.embed[ids.long()], self.config.layers - 1
        for layer in range(self.config.layers):
            normed = rms_norm(x, self._vector(layer, "input_layernorm.weight"), self.config.rms_eps, impl=self.impl)
            k, v = self._heads(layer, "k_proj", normed), self._heads(layer, "v_proj", normed)
            slots = plan.slots
            if layer == last and out_plan is not None:  # nothing reads the other rows any more
                self._rope(layer, k.new_empty(len(k), 0, k.shape[2]), k, v, plan, slots, pool)
                x, normed, k, v = (t[out_rows.long()] for t in (x, normed, k, v))
                plan, slots = out_plan, torch.full_like(out_rows, -1)
            q = self._rope(layer, self._heads(layer, "q_proj", normed), k, v, plan, slots, pool)
            attended = tree_attention(
                q, pool.k[layer], pool.v[layer], plan, scale=self.config.scale, window=self.config.window, impl=self.impl
            )
            x = x + self._linear(layer, "self_attn.o_proj", attended.flatten(1))
            x = x + self._mlp(layer, x)
        if output == "hidden":
            return x.float()
        x = rms_norm(x, self.vectors["model.norm.weight"], self.config.rms_eps, impl=self.impl)
        return self._logits(x)

    def _logits(self, x: Tensor) -> Tensor:
        logits = linear(x, self.packed[LM_HEAD]).float()
        if self.refine is not None:
            refine_logits(logits, x, self.refine, impl=self.impl)
        return logits

    def _heads(self, layer: int, name: str, x: Tensor) -> Tensor:
        return self._linear(layer, f"self_attn.{name}", x).unflatten(1, (-1, self.config.head_dim))

    def _rope(self, layer: int, q: Tensor, k: Tensor, v: Tensor, plan: Plan, slots: Tensor, pool: PagePool) -> Tensor:
        """Turned q, after writing k and v of the rows that have a slot."""
        return rope_append(
            q, k, v, self.config.inv_freq, plan.positions, slots, pool.k[layer], pool.v[layer],
            rope_scale=self.config.rope_scale,
            q_norm=self._vector(layer, "self_attn.q_norm.weight"),
            k_norm=self._vector(layer, "self_attn.k_norm.weight"),
            eps=self.config.rms_eps,
            impl=self.impl,
        )  # fmt: skip

    def _mlp(self, layer: int, x: Tensor) -> Tensor:
        x = rms_norm(
            x, self._vector(layer, "post_attention_layernorm.weight"), self.config.rms_eps, impl=self.impl
        )
        gate, up = self._linear(layer, "mlp.gate_proj", x), self._linear(layer, "mlp.up_proj", x)
        return self._linear(layer, "mlp.down_proj", silu_mul(gate, up, impl=self.impl))

    def _linear(self, layer: int, name: str, x: Tensor) -> Tensor:
        bias = self._vector(layer, f"{name}.bias")
        return linear(x, self.packed[f"model.layers.{layer}.{name}.weight"], bias)

    def _vector(self, layer: int, name: str) -> Tensor | None:
        """A norm's weight or a bias; None if the family has none."""
        return self.vectors.get(f"model.layers.{layer}.{name}")
