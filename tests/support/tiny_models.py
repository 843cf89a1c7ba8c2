"""Tiny random checkpoints of every supported family, written in the real Hugging Face layout."""

from __future__ import annotations

from pathlib import Path

import torch

BASE = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "eos_token_id": 7,
    "bos_token_id": 1,
}
# for what is slow: kernels in Triton's interpreter
SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}

# name -> (model_type, changes to BASE).
# Head dims 64, 80, 96, 128; groups 1, 2, 3, 4, 5, 7; qwen2 derives head_dim from hidden_size.
VARIANTS = {
    "llama": ("llama", {}),
    "llama_smollm2": (
        "llama",
        {
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "head_dim": None,
            "hidden_size": 192,
        },
    ),
    "llama_rope3_bias": (
        "llama",
        {"rope_parameters": LLAMA3, "attention_bias": True, "num_key_value_heads": 4},
    ),
    "llama_linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "mistral_window": ("mistral", {"sliding_window": 9, "head_dim": 128, "num_key_value_heads": 1}),
    "mistral_full": ("mistral", {"sliding_window": None, "head_dim": 96}),
    "qwen2": (
        "qwen2",
        {"num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": None, "hidden_size": 7 * 64},
    ),
    "qwen2_window": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 17,
            "max_window_layers": 0,
            "tie_word_embeddings": True,
            "head_dim": None,
            "hidden_size": 256,
        },
    ),
    "qwen2_yarn": (
        "qwen2",
        {"rope_parameters": YARN, "max_position_embeddings": 64, "head_dim": None, "hidden_size": 320},
    ),
    "qwen3": (
        "qwen3",
        {"num_attention_heads": 10, "num_key_value_heads": 2, "head_dim": 128, "attention_bias": True},
    ),
    "qwen3_tied": ("qwen3", {"tie_word_embeddings": True}),
}


def config_of(variant: str, **changes):
    """The transformers config of a variant."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type, own = VARIANTS[variant]
    entries = BASE | own | changes
    return CONFIG_MAPPING[model_type](
        **{k: v for k, v in entries.items() if v is not None or k == "sliding_window"}
    )


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights large enough that attention is far from uniform; norms and biases away from their defaults."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.5 * noise)
            elif "embed" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * (1.5 / parameter.shape[1] ** 0.5))
    return model


def write_tiny(
    folder: Path, variant: str, seed: int = 0, kind: str = "ForCausalLM", shard: str = "1GB", **changes
) -> torch.nn.Module:
    """Save a random model of `variant` to `folder` and return it (float32, eager attention, eval).

    Args:
        kind: "ForCausalLM" or "ForTokenClassification"
        shard: max_shard_size of save_pretrained
    """
    import transformers

    config = config_of(variant, **changes)
    config._attn_implementation = "eager"
    factory = getattr(transformers, f"AutoModel{kind}" if kind.startswith("For") else kind)
    model = randomize(factory.from_config(config, attn_implementation="eager").float().eval(), seed)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def rewrite(folder: Path, change) -> None:
    """Apply `change(tensors: dict) -> None` to model.safetensors of a folder."""
    from safetensors.torch import load_file, save_file

    file = Path(folder) / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
