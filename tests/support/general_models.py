"""Tiny random transformers models of families that the fused decoder does not know."""

from __future__ import annotations

import torch
from tiny_models import BASE, randomize
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SMALL = BASE | {"head_dim": 16, "pad_token_id": 0}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "head_dim": None,
    "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
GPT = dict.fromkeys(["hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "intermediate_size"])
GPT |= {"num_key_value_heads": None, "head_dim": None, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
MIXED = ["sliding_attention", "full_attention"]

# name -> (model_type, changes to SMALL). Windows shorter than a walk, soft caps, sinks, experts, k wider than v, heads of 24.
GENERAL = {
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"sliding_window": 9, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", {"sliding_window": 9, "layer_types": MIXED, "head_dim": 24, "num_key_value_heads": 1}),
    "gpt_oss": ("gpt_oss", {"sliding_window": 9, "num_local_experts": 4} | EXPERTS),
    "deepseek": ("deepseek_v3", MLA | EXPERTS),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4} | EXPERTS),
    "mixtral": ("mixtral", {"sliding_window": 9, "num_local_experts": 4} | EXPERTS),
    "phi3": ("phi3", {"sliding_window": 9, "head_dim": None}),
    "phi": ("phi", {"head_dim": None, "partial_rotary_factor": 0.5}),
    "gpt2": ("gpt2", GPT),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64, "head_dim": None}),
    "olmo2": ("olmo2", {"head_dim": None}),
    "cohere2": ("cohere2", {"sliding_window": 9, "layer_types": MIXED, "logit_scale": 0.5}),
    "glm4": ("glm4", {}),
    "smollm3": ("smollm3", {"head_dim": None}),
}


def general_tiny(variant: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
    """A random model of a variant, or of a model_type of transformers."""
    model_type, own = GENERAL.get(variant, (variant, {}))
    entries = {name: value for name, value in (SMALL | own | changes).items() if value is not None}
    hf = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**entries), attn_implementation="eager")
    return randomize(hf.float().eval(), seed).to(dtype)
