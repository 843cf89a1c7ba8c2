"""Model families as data: what a config.json means for the decoder, and which features it must not ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ttskernels.models.config import DecoderConfig, max_positions, rope_frequencies


@dataclass(frozen=True)
class Family:
    """A field is a constant, or the name of the config entry that decides."""

    model_type: str
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    qk_norm: bool = False
    window: bool = True  # a sliding_window counts


FAMILIES = {
    family.model_type: family
    for family in (
        # also SmolLM2, TinyLlama, DeepSeek-LLM
        Family("llama", qkv_bias="attention_bias", o_bias="attention_bias", window=False),
        Family("mistral"),
        Family("qwen2", qkv_bias=True),  # also Qwen2.5 and its process reward models
        Family("qwen3", qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=True),
    )
}
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings",
)  # fmt: skip


def family_of(model_type: str | None) -> Family:
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type must be one of {', '.join(sorted(FAMILIES))}, got {model_type!r}; use a checkpoint of one of these, or "
            "add a Family to ttskernels/models/families.py if the decoder is built alike"
        )
    return FAMILIES[model_type]


def decoder_config(
    raw: dict[str, Any], dtype: torch.dtype, eos_ids: tuple[int, ...] | None = None
) -> DecoderConfig:
    """The decoder's configuration from the entries of a config.json.

    Raises:
        ValueError: an unknown family, a feature the decoder does not compute, or an entry of the wrong kind; the message
            names it.
    """
    family = family_of(raw.get("model_type"))
    _refuse_entries(raw)
    try:
        config = _complete(raw)
        inv_freq, rope_scale = rope_frequencies(config)
    except ValueError:
        raise
    except Exception as error:  # transformers' own, or where an entry it let through breaks
        reason = " ".join(str(error).split())
        raise ValueError(
            f"config.json does not describe a {family.model_type} model ({type(error).__name__}: {reason}); "
            "correct the entry, or download the file again"
        ) from error
    _refuse_unsupported(config)

    def flag(value: bool | str) -> bool:
        return bool(getattr(config, value)) if isinstance(value, str) else value

    return DecoderConfig(
        vocab=config.vocab_size,
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        q_heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        intermediate=config.intermediate_size,
        rms_eps=config.rms_norm_eps,
        inv_freq=inv_freq,
        rope_scale=rope_scale,
        max_positions=max_positions(config),
        qkv_bias=flag(family.qkv_bias),
        o_bias=flag(family.o_bias),
        qk_norm=family.qk_norm,
        tie_embeddings=bool(config.tie_word_embeddings),
        window=_window(config) if family.window else 0,
        scale=config.head_dim**-0.5,
        dtype=dtype,
        eos_ids=_as_ids(config.eos_token_id) if eos_ids is None else eos_ids,
        model_type=family.model_type,
    )


def _complete(raw: dict[str, Any]) -> Any:
    """The transformers config: defaults filled in, old spellings of the rope entries translated."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    entries = {key: value for key, value in raw.items() if key != "auto_map"}
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(entries)
    if getattr(config, "head_dim", None) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    return config


def _refuse_entries(raw: dict[str, Any]) -> None:
    """What transformers would trip over without a name."""
    for name in SIZES:
        if isinstance(size := raw.get(name), int) and size < 1:
            raise ValueError(f"{name} of config.json must be positive, got {size}; download the file again")
    if quantization := raw.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise ValueError(
            f"quantization_config must be absent, got quant_method {method!r}; "
            "use the unquantised checkpoint or a .gguf file"
        )


def _refuse_unsupported(config: Any) -> None:
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(
            f"hidden_act must be 'silu', got {config.hidden_act!r}; this decoder has no other activation"
        )
    if getattr(config, "mlp_bias", False):
        raise ValueError("mlp_bias must be false, got true; this decoder has no MLP biases")
    if config.head_dim % 16 or config.head_dim > 256:
        raise ValueError(
            f"head_dim must be a multiple of 16 up to 256, got {config.head_dim}; this decoder has no other heads"
        )
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads must be a multiple of num_key_value_heads, got {config.num_attention_heads} and "
            f"{config.num_key_value_heads}"
        )


def _window(config: Any) -> int:
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"layer_types may hold full_attention or sliding_attention, got {', '.join(sorted(unknown))}"
        )
    if not window or window >= max_positions(config) or kinds == {"full_attention"}:
        return 0
    if window < 0:
        raise ValueError(f"sliding_window must be positive, or null for none, got {window}")
    if len(kinds) == 2:
        raise ValueError(
            "layer_types must be the same for every layer, got a mix of full_attention and sliding_attention; "
            "set use_sliding_window to false if the checkpoint works without it"
        )
    return window


def _as_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
