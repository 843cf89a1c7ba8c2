"""Adapters merged at load: against the adapter applied beside its base, and everything that is not plain LoRA."""

import pytest
import torch
from prm_checkpoints import edit_json, to_bin, write_math_psa
from safetensors.torch import load_file, save_file
from tiny_models import config_of, rewrite

from ttskernels.models import HeadSpec, load_checkpoint
from ttskernels.models.lora import PREFIX

HEAD = HeadSpec(rows=(4, 9), mix=(1, 0))
QUERY = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path):
    write_math_psa(tmp_path, config_of("llama"))
    return tmp_path


def change_adapter(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


def change_config(folder, **entries):
    edit_json(folder / "adapter_config.json", **entries)


def merged(folder, scaling, dtype=torch.float32):
    """The query weight of layer 1 with its adapter, written out."""
    adapter = load_file(folder / "adapter_model.safetensors")
    a, b = (adapter[f"{PREFIX}{QUERY}.lora_{side}.weight"] for side in "AB")
    base = load_file(folder / "base" / "model.safetensors")[f"{QUERY}.weight"]
    return (base.float() + scaling * (b @ a)).to(dtype)


def test_merged_in_float32_before_rounding(folder):
    rewrite(folder / "base", lambda t: t.update({name: x.bfloat16() for name, x in t.items()}))
    weights = load_checkpoint(folder, torch.bfloat16).weights
    assert torch.equal(weights[f"{QUERY}.weight"], merged(folder, 32 / 8, torch.bfloat16))
    untouched = load_file(folder / "base" / "model.safetensors")
    assert torch.equal(
        weights["model.layers.1.self_attn.k_proj.weight"], untouched["model.layers.1.self_attn.k_proj.weight"]
    )


@pytest.mark.parametrize("entries, scaling", [({"use_rslora": True}, 32 / 8**0.5), ({"lora_alpha": 3}, 3 / 8)])
def test_scaling(folder, entries, scaling):
    change_config(folder, **entries)
    weight = load_checkpoint(folder, torch.float32).weights[f"{QUERY}.weight"]
    torch.testing.assert_close(weight, merged(folder, scaling))


@pytest.mark.parametrize(
    "targets", [["self_attn.q_proj", "v_proj"], r"model\.layers\.\d+\.self_attn\.(q|v)_proj", None]
)
def test_targets(folder, targets):
    """Ends of names, a pattern of whole names, and one adapted layer of two."""
    if targets is None:
        change_config(folder, layers_to_transform=1)
        change_adapter(folder, lambda t: [t.pop(name) for name in list(t) if ".layers.0." in name])
    else:
        change_config(folder, target_modules=targets)
    weight = load_checkpoint(folder, torch.float32).weights[f"{QUERY}.weight"]
    torch.testing.assert_close(weight, merged(folder, 32 / 8))


def test_adapter_as_bin(folder):
    before = load_checkpoint(folder, torch.float32).weights
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    to_bin(folder / "base")
    after = load_checkpoint(folder, torch.float32).weights
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_base_of_the_caller(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "base"
    (folder / "base").rename(elsewhere)
    with pytest.raises(
        FileNotFoundError, match="adapter in .* belongs to .*/base: .* does not exist.*; pass base= where"
    ):
        load_checkpoint(folder)
    assert load_checkpoint(folder, head=HEAD, base=elsewhere).head is not None
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_checkpoint(folder, base=folder / "nowhere")
    change_config(folder, base_model_name_or_path=None)
    with pytest.raises(ValueError, match="base must be the model that the adapter in .* belongs to, got None"):
        load_checkpoint(folder)
    change_config(folder, base_model_name_or_path="owner/name", revision="v2")
    with pytest.raises(ValueError, match="base must be owner/name at revision v2, which the adapter in .* got None"):
        load_checkpoint(folder)
    (elsewhere / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="the base model .* of the adapter in .* holds no config.json"):
        load_checkpoint(folder, base=elsewhere)


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"peft_type": "IA3"}, r"peft_type must be one of \('LORA',\), got 'IA3'; only plain LoRA is merged here"),
        ({"use_dora": True}, r"use_dora must be one of \(False,\), got True"),
        ({"bias": "lora_only"}, r"bias must be one of \('none',\), got 'lora_only'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be one of .*, got 'pissa'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out must be one of"),
        ({"modules_to_save": ["score"]}, r"modules_to_save must be empty, got \['score'\]; .*merge it with PEFT"),
        ({"rank_pattern": {"q_proj": 4}}, r"rank_pattern must be empty, got \{'q_proj': 4\}"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern must be empty"),
        ({"layer_replication": [[0, 2]]}, "layer_replication must be empty"),
        ({"exclude_modules": "lm_head"}, "exclude_modules must be empty, got 'lm_head'"),
        ({"r": None, "lora_alpha": None}, "adapter_config.json must hold r, lora_alpha"),
        ({"target_modules": ["c_attn"]}, "target_modules .'c_attn',. match no weight of the base model"),
        (
            {"target_modules": ["q_proj", "k_proj"]},
            "lacks .*k_proj.lora_A.weight, .*, which its adapter_config.json asks",
        ),
        (
            {"target_modules": ["q_proj"]},
            "holds .*v_proj.lora_A.weight, .* which target_modules .'q_proj',. do not name",
        ),
        (
            {"r": 4},
            r"must have shapes \(4, 64\) and \(256, 4\) for this base model and r = 4, got \(8, 64\) and \(256, 8\)",
        ),
    ],
)
def test_not_plain_lora(folder, entries, message):
    change_config(folder, **entries)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)


def test_adapter_weights_missing_or_extra(folder):
    name = f"{PREFIX}{QUERY}.lora_B.weight"
    kept = load_file(folder / "adapter_model.safetensors")[name]
    change_adapter(folder, lambda t: t.pop(name))
    with pytest.raises(ValueError, match=f"lacks {name}, which its adapter_config.json asks for"):
        load_checkpoint(folder)
    change_adapter(folder, lambda t: t.update({name: kept, f"{PREFIX}lm_head.weight": kept.clone()}))
    with pytest.raises(ValueError, match=f"holds {PREFIX}lm_head.weight, which target_modules"):
        load_checkpoint(folder)


def test_adapter_folder_without_adapter(folder):
    (folder / "adapter_model.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="holds adapter_config.json but neither adapter_model.safetensors nor"):
        load_checkpoint(folder)


def test_adapter_beside_a_whole_model(folder):
    (folder / "base" / "model.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(
        ValueError, match="holds an adapter and model.safetensors; keep the adapter, or the whole model"
    ):
        load_checkpoint(folder)
