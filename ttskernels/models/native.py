"""The decoder as one C++ object: a forward, or many decode iterations with sampling, is one call."""

from __future__ import annotations

import ctypes
import re
import weakref
from collections.abc import Mapping

import torch
from torch import Tensor

from ttskernels import _dispatch
from ttskernels.errors import BadLogitsError
from ttskernels.kv.plan import Plan
from ttskernels.kv.pool import PagePool
from ttskernels.models.config import DecoderConfig
from ttskernels.models.decoder import FLOAT, LM_HEAD, NONE_ROUNDED, Forms
from ttskernels.ops.linear import FORMS, Rounded

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# A matrix is two tensors: its values, and the scales of one that is rounded already.
_LAYER_WEIGHTS = (
    "input_layernorm.weight",
    "self_attn.q_proj.weight", "self_attn.q_proj.bias",
    "self_attn.k_proj.weight", "self_attn.k_proj.bias",
    "self_attn.v_proj.weight", "self_attn.v_proj.bias",
    "self_attn.q_norm.weight", "self_attn.k_norm.weight",
    "self_attn.o_proj.weight", "self_attn.o_proj.bias",
    "post_attention_layernorm.weight",
    "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight",
)  # fmt: skip


class NativeDecoder:
    """Same interface and results (within rounding) as `PythonDecoder`. Weights are copied and packed once; beside that
    the vocabulary head is kept as it is, where one in int8 is refined."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: dict[str, Tensor],
        lm_head: bool,
        forms: Forms = FLOAT,
        rounded: Mapping[str, Rounded] = NONE_ROUNDED,
    ):
        c = config

        def tensors(name: str, weight: Tensor | None) -> list[Tensor | None]:
            if not name.endswith("_proj.weight") and name != LM_HEAD:
                return [weight]
            return [rounded[name].values, rounded[name].scales] if name in rounded else [weight, None]

        embed = weights["model.embed_tokens.weight"]
        flat, head = [embed, weights["model.norm.weight"]], weights.get(LM_HEAD, embed)
        flat += tensors(LM_HEAD, head) if lm_head else [None, None]
        flat += [head if lm_head and forms.most == "int8" else None]  # kept, not copied: for `refine_logits`
        names = [f"model.layers.{i}.{name}" for i in range(c.layers) for name in _LAYER_WEIGHTS]
        flat += [tensor for name in names for tensor in tensors(name, weights.get(name))]
        flat = [w if w is None else w.contiguous() for w in flat]
        ints = [
            c.vocab,
            c.hidden,
            c.layers,
            c.q_heads,
            c.kv_heads,
            c.head_dim,
            c.intermediate,
            c.window,
            _DTYPES[c.dtype],
            FORMS.index(forms.most),
            FORMS.index(forms.kv),
            FORMS.index(forms.down),
        ]
        constants = [c.rms_eps, c.rope_scale, c.scale, 0.0]
        self._handle = torch.ops.ttskernels.decoder_create(ints, constants, c.inv_freq.contiguous(), flat)
        self._widths = (c.hidden, c.vocab)
        free = _dispatch.library().ttsk_decoder_free
        free.argtypes = [ctypes.c_int64]
        weakref.finalize(self, free, self._handle)

    def memory_bytes(self) -> tuple[int, int]:
        """(weights, scratch) it holds now, next to what torch's allocator knows of. Scratch grows to the largest call."""
        total = (ctypes.c_int64 * 2)()
        _dispatch.library().ttsk_decoder_memory(ctypes.c_int64(self._handle), total)
        return total[0], total[1]

    def forward(
        self, ids: Tensor, plan: Plan, pool: PagePool, out_plan: Plan | None, out_rows: Tensor, output: str
    ) -> Tensor:
        kind, last = int(output == "logits"), None if out_plan is None else out_plan.buffer
        return torch.ops.ttskernels.decoder_forward(
            self._handle, pool.k, pool.v, plan.buffer, ids, out_rows, kind, self._widths[kind], last
        )

    def decode(self, ids, plan, pool, keys, params, next_state, states, tokens, logprobs) -> int:
        try:
            done = torch.ops.ttskernels.decoder_decode(
                self._handle, pool.k, pool.v, plan.buffer, ids, keys, params, next_state, states, tokens, logprobs
            )
            return int(done)
        except RuntimeError as error:
            bad = re.search(r"logits of row (\d+) are not finite.*", str(error))
            if bad is None:
                raise
            raise BadLogitsError(bad[0], int(bad[1])) from error
