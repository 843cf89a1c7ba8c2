"""Tiny random process reward models, each written in the layout in which its family is published.

Every builder takes a folder and a transformers config (`tiny_models.config_of`), writes the checkpoint without a
tokenizer, and returns the same weights as plain PyTorch: what a family's own scoring code would have loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_models import randomize
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification


@dataclass
class PlainPrm:
    """`trunk(ids)` gives hidden states after the final norm; `head` turns them into logits (before any squash)."""

    trunk: nn.Module
    head: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def hidden(self, ids: Tensor) -> Tensor:
        """`[batch, tokens] -> [batch, tokens, hidden]`"""
        return self.trunk(ids).last_hidden_state

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """`[batch, tokens] -> [batch, tokens, labels]`, over the vocabulary for a plain language model."""
        return self.head(self.trunk(ids).last_hidden_state)


def write_causal_lm(folder: Path, config, seed: int = 0) -> PlainPrm:
    """Math-Shepherd, RLHFlow, ER-PRM, VersaPRM, Llemma, EurusPRM: *ForCausalLM, nothing else."""
    model = _causal_lm(config, seed)
    model.save_pretrained(folder)
    return PlainPrm(model.model, model.lm_head)


def write_skywork(folder: Path, config, seed: int = 0) -> PlainPrm:
    """Skywork-o1-Open-PRM: pytorch_model.bin of TRL's wrapper, vocabulary head included; remote code in auto_map."""
    model, head = _causal_lm(config, seed), _linear(config.hidden_size, 1, seed)
    _write_config(folder, config, "Qwen2ForPrmModel", auto_map={"AutoModel": "modeling_qwen2_rm.Qwen2ForRewardModel"})
    torch.save(_state(model) | _named(head, "v_head.summary"), folder / "pytorch_model.bin")
    return PlainPrm(model.model, head)


def write_qwen_prm(folder: Path, config, seed: int = 0) -> PlainPrm:
    """Qwen2.5-Math-PRM, -PRM800K: Linear, ReLU, Linear(2) as score.0 and score.2, an unused vocabulary head."""
    model = _causal_lm(config, seed)
    first, second = (
        _linear(config.hidden_size, config.hidden_size, seed),
        _linear(config.hidden_size, 2, seed + 1),
    )
    _write_config(
        folder,
        config,
        "Qwen2ForProcessRewardModel",
        auto_map={"AutoModel": "modeling_qwen2_rm.Qwen2ForProcessRewardModel"},
    )
    _save(folder, _state(model) | _named(first, "score.0") | _named(second, "score.2"))
    return PlainPrm(model.model, nn.Sequential(first, nn.ReLU(), second))


def write_token_classifier(folder: Path, config, seed: int = 0) -> PlainPrm:
    """TRL and PURE (num_labels 2), MathMinos (num_labels 1): *ForTokenClassification."""
    factory = AutoModelForTokenClassification.from_config(config, attn_implementation="eager")
    model = randomize(factory.float().eval(), seed)
    model.save_pretrained(folder)
    return PlainPrm(model.model, model.score)


def write_pqm(folder: Path, config, seed: int = 0) -> PlainPrm:
    """PQM: one model.safetensors written by DeepSpeed, no config.json; `config` has the embedding with [PRM] added.

    The base's config.json, with another vocab_size, is written to `folder / "base"`.
    """
    model, head = _causal_lm(config, seed), _linear(config.hidden_size, 1, seed)
    wrapped = {f"pretrained_model.{name}": tensor for name, tensor in _state(model).items()}
    _save(folder, wrapped | _named(head, "v_head.summary"))
    _write_config(folder / "base", config, _architecture(model), vocab_size=config.vocab_size + 29)
    return PlainPrm(model.model, head)


def write_reason_eval(folder: Path, config, seed: int = 0) -> PlainPrm:
    """ReasonEval-7B (mistral) and -34B (llama): three labels, no vocabulary head; `use_bias` / `bias` of `config`."""
    model = _causal_lm(config, seed)
    small = config.model_type == "mistral"
    bias = bool(getattr(config, "use_bias" if small else "bias", False))
    head = _linear(config.hidden_size, 3, seed, bias=bias)
    entries = {"score_dimension": 3, "use_bias": bias} if small else {"score_dim": 3, "bias": bias}
    _write_config(folder, config, "ReasonEval_7B" if small else "ReasonEval_34B", **entries)
    trunk = {name: tensor for name, tensor in _state(model).items() if name != "lm_head.weight"}
    _save(folder, trunk | _named(head, "score_head"))
    return PlainPrm(model.model, head)


def write_math_psa(folder: Path, config, seed: int = 0, rank: int = 8, alpha: float = 32, **entries) -> PlainPrm:
    """Math-psa: a PEFT adapter on q_proj and v_proj; its base model is written to `folder / "base"`.

    Args:
        entries: changes to adapter_config.json
    Returns:
        The model with the adapter applied beside the weights it belongs to, not merged.
    """
    write_causal_lm(folder / "base", config, seed)
    model, generator = _causal_lm(config, seed), torch.Generator().manual_seed(seed + 1)
    raw = {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": str(folder / "base"),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": 0.1,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": ["v_proj", "q_proj"],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    } | entries
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    scaling, adapter = alpha / (rank**0.5 if raw["use_rslora"] else rank), {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "v_proj")):
            a = torch.randn(rank, module.in_features, generator=generator) / module.in_features**0.5
            b = torch.randn(module.out_features, rank, generator=generator) / rank
            adapter |= {
                f"base_model.model.{name}.lora_A.weight": a,
                f"base_model.model.{name}.lora_B.weight": b,
            }
            module.register_forward_hook(_lora(a, b, scaling))
    save_file(adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return PlainPrm(model.model, model.lm_head)


def write_reward_head(folder: Path, config, seed: int = 0) -> PlainPrm:
    """ReasonFlux-PRM-1.5B: a language model, and reward_head.pt beside it."""
    model, head = _causal_lm(config, seed), _linear(config.hidden_size, 1, seed)
    model.save_pretrained(folder)
    torch.save(head.state_dict(), folder / "reward_head.pt")
    return PlainPrm(model.model, head)


def to_bin(folder: Path, shards: int = 1) -> None:
    """Replace model.safetensors by pytorch_model.bin, or by so many shards and their index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    weight_map = {name: f"pytorch_model-{i % shards + 1:05}-of-{shards:05}.bin" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        torch.save({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def edit_json(file: Path, **entries) -> None:
    """Change entries of a JSON file; None removes one."""
    raw = json.loads(file.read_text()) | entries
    file.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def _lora(a: Tensor, b: Tensor, scaling: float):
    return lambda module, inputs, output: output + scaling * (inputs[0] @ a.T.to(output) @ b.T.to(output))


def _causal_lm(config, seed: int) -> nn.Module:
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return randomize(model.float().eval(), seed)


def _linear(inputs: int, outputs: int, seed: int, bias: bool = True) -> nn.Linear:
    return randomize(nn.Linear(inputs, outputs, bias=bias), seed + 100)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _named(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor.detach().clone() for name, tensor in module.state_dict().items()}


def _architecture(model: nn.Module) -> str:
    return type(model).__name__


def _write_config(folder: Path, config, architecture: str, **entries) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    raw = config.to_dict() | {"architectures": [architecture]} | entries
    (folder / "config.json").write_text(json.dumps(raw))


def _save(folder: Path, tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
