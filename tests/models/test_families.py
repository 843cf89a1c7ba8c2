import pytest
import torch
from tiny_models import LLAMA3, VARIANTS, YARN, config_of

from ttskernels.models.families import decoder_config


def raw(variant="llama", **changes):
    return config_of(variant).to_dict() | changes


@pytest.mark.parametrize("variant", VARIANTS)
def test_rope_equals_transformers(variant):
    from transformers import AutoModel

    config = config_of(variant)
    rotary = AutoModel.from_config(config).rotary_emb
    ours = decoder_config(config.to_dict(), torch.float32)
    assert torch.equal(ours.inv_freq, rotary.inv_freq)
    assert ours.rope_scale == rotary.attention_scaling


def test_old_rope_spelling():
    scaling = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    old = {k: v for k, v in raw().items() if k != "rope_parameters"} | {
        "rope_theta": 10000.0,
        "rope_scaling": scaling,
    }
    new = raw(rope_parameters=LLAMA3)
    assert torch.equal(
        decoder_config(old, torch.float32).inv_freq, decoder_config(new, torch.float32).inv_freq
    )


def test_fields():
    config = decoder_config(raw("qwen2_yarn", eos_token_id=[3, 4]), torch.bfloat16)
    assert (config.max_positions, config.eos_ids, config.qkv_bias, config.o_bias) == (
        256,
        (3, 4),
        True,
        False,
    )
    assert YARN["factor"] * YARN["original_max_position_embeddings"] == 256
    assert decoder_config(raw("mistral_window"), torch.float32).window == 9
    assert (
        decoder_config(raw("mistral_window", sliding_window=4096), torch.float32).window == 0
    )  # longer than any row
    assert decoder_config(raw(sliding_window=16, layer_types=["sliding_attention"] * 2), torch.float32).window == 0  # Llama
    assert decoder_config(raw("qwen3"), torch.float32).qk_norm


def test_flops_and_bytes():
    config = decoder_config(raw(), torch.bfloat16)
    queries, keys, hidden, inner, layers, vocab = 4 * 64, 2 * 64, 64, 96, 2, 131
    weights = layers * (hidden * (2 * queries + 2 * keys) + 3 * hidden * inner)
    assert config.flops(9) == 2 * (weights + hidden * vocab + layers * 2 * queries * 10)
    assert config.flops(9, output="hidden") == 2 * (weights + layers * 2 * queries * 10)
    unread = hidden * (2 * queries) + 3 * hidden * inner + 2 * queries * 10
    assert config.flops(9, output="kv") == config.flops(9, output="hidden") - 2 * unread
    assert config.kv_bytes_per_token == layers * 2 * keys * 2
    window = decoder_config(raw("mistral_window"), torch.bfloat16)
    assert window.flops(100) == window.flops(8) > window.flops(7)
    for counted in (config, window):
        for output in ("logits", "hidden", "kv"):
            assert counted.flops(3, 20, output) == sum(counted.flops(3 + i, 1, output) for i in range(20))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "mamba"}, "model_type must be one of llama, mistral, qwen2, qwen3, got 'mamba'"),
        ({"model_type": None}, "got None; use a checkpoint of one of these, or add a Family to"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias must be false"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method 'awq'"),
        ({"quantization_config": "gptq"}, "quantization_config must be absent, got quant_method 'gptq'"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads, got 4 and 3"),
        ({"num_attention_heads": 0}, "num_attention_heads of config.json must be positive, got 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads of config.json must be positive, got 0"),
        ({"head_dim": 4}, "head_dim must be a multiple of 16 up to 256, got 4"),
        ({"head_dim": 24}, "got 24"),
        ({"head_dim": 320}, "got 320"),
        ({"model_type": "mistral", "sliding_window": -1}, "sliding_window must be positive, or null for none, got -1"),
        ({"rms_norm_eps": 1}, "config.json does not describe a llama model .*'rms_norm_eps' expected float, got int"),
        ({"rms_norm_eps": "1e-6"}, "'rms_norm_eps' expected float, got str"),
        ({"eos_token_id": 7.0}, "'eos_token_id' with value 7.0"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0}}, "'rope_type'='longrope'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "1e4"}}, "rope_theta of rope_parameters .* got '1e4'"),
        ({"rope_parameters": {"rope_type": "mrope", "rope_theta": 1e4}}, "got 'mrope': this decoder does not compute it"),
        ({"rope_parameters": {"rope_type": "su", "rope_theta": 1e4}}, "got 'su': its frequencies change with the length"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type must be one of default, linear, llama3, yarn, got 'dynamic'",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor must be 1, got 0.5",
        ),
    ],
)
def test_unsupported(changes, message):
    with pytest.raises(ValueError, match=message):
        decoder_config(raw(**changes), torch.float32)


def test_longrope_is_refused():
    factors = [1.0] * 32
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 2.0,
        "short_factor": factors,
        "long_factor": factors,
    }
    with pytest.raises(ValueError, match="got 'longrope'"):
        decoder_config(raw(rope_parameters=rope | {"original_max_position_embeddings": 128}), torch.float32)


@pytest.mark.parametrize("variant", ["mistral_window", "qwen2_window"])
def test_a_window_as_long_as_the_unscaled_positions(variant):
    changes = {"sliding_window": 64, "max_position_embeddings": 64, "rope_parameters": YARN}
    config = decoder_config(raw(variant, **changes), torch.float32)
    assert (config.window, config.max_positions) == (64, 256)


def test_mixed_windows_are_refused():
    mixed = raw("qwen2_window", max_window_layers=1, layer_types=None)
    with pytest.raises(ValueError, match="a mix of full_attention and sliding_attention"):
        decoder_config(mixed, torch.float32)
