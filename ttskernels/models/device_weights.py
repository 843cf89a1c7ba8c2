"""Weights as the device decoder multiplies by them: what reads the same rows is one matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ttskernels.models.config import DecoderConfig


@dataclass(frozen=True)
class LayerWeights:
    """One layer; matrices `[out, in]`."""

    input_norm: Tensor
    qkv: Tensor  # queries, keys, values
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor


def layer_weights(config: DecoderConfig, weights: dict[str, Tensor], layer: int, device: torch.device) -> LayerWeights:
    """Layer `layer` of `weights` (Hugging Face names) on `device`."""

    def get(name: str) -> Tensor | None:
        found = weights.get(f"model.layers.{layer}.{name}")
        return None if found is None else found.to(device)

    def fused(*names: str) -> Tensor | None:
        parts = [get(name) for name in names]
        return None if parts[0] is None else torch.cat(parts)

    projections = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return LayerWeights(
        get("input_layernorm.weight"),
        fused(*(f"{p}.weight" for p in projections)),
        fused(*(f"{p}.bias" for p in projections)),
        get("self_attn.q_norm.weight"),
        get("self_attn.k_norm.weight"),
        get("self_attn.o_proj.weight"),
        get("self_attn.o_proj.bias"),
        get("post_attention_layernorm.weight"),
        fused("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        get("mlp.down_proj.weight"),
    )
