"""A tiny checkpoint of every PRM family: real layout, random weights, a tokenizer that behaves like the real one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tiny_tokenizers
import torch
from tiny_models import rewrite, write_tiny

SIZES = {"max_position_embeddings": 1024, "num_attention_heads": 2, "num_key_value_heads": 1}


@dataclass(frozen=True)
class Layout:
    variant: str  # of tiny_models
    tokenizer: str
    head: str = "ForCausalLM"
    arguments: tuple[str | None, ...] = ()


LAYOUTS = {
    "math-shepherd": Layout("mistral_full", "mistral"),
    "mathminos": Layout("mistral_full", "mistral", "labels 1"),
    "rlhflow-mistral": Layout("llama", "llama3"),
    "rlhflow-deepseek": Layout("llama_rope3_bias", "llama3"),
    "skywork": Layout("qwen2", "qwen", "v_head", ("<|im_start|>",)),
    "qwen-math-prm": Layout("qwen2", "qwen", "mlp", (None, "<extra_0>")),
    "math-psa": Layout("qwen2", "qwen"),
    "er-prm": Layout("llama", "llama3"),
    "versaprm": Layout("llama", "llama3"),
    "versaprm-qwen": Layout("qwen2", "qwen"),
    "pqm": Layout("llama", "deepseek", "v_head"),
    "trl": Layout("qwen2", "qwen", "labels 2"),
    "trl-blank-line": Layout("llama", "llama3", "labels 2"),
    "pure": Layout("qwen2", "qwen", "labels 2"),
    "llemma": Layout("llama", "mistral"),
    "rebase": Layout("llama", "mistral"),
    "reasoneval-7b": Layout("mistral_full", "mistral", "score_head", ("<s>",)),
    "reasoneval-34b": Layout("llama", "mistral", "score_head"),
}


def tokenizer_of(family: str):
    layout = LAYOUTS[family]
    return getattr(tiny_tokenizers, layout.tokenizer)(*layout.arguments)


def write_prm(folder: Path, family: str, seed: int = 0) -> Path:
    """Config, weights and tokenizer files of a random PRM of `family`."""
    layout, tokenizer = LAYOUTS[family], tokenizer_of(family)
    sizes = SIZES | {"vocab_size": len(tokenizer) + 3}  # real ones are padded too
    if layout.variant == "qwen2":
        sizes |= {"hidden_size": 128}
    kind, labels = "ForCausalLM", {}
    if layout.head.startswith("labels"):
        kind, labels = "ForTokenClassification", {"num_labels": int(layout.head.split()[1])}
    model = write_tiny(folder, layout.variant, seed, kind, **sizes, **labels)
    hidden = model.config.hidden_size
    draw = torch.Generator().manual_seed(seed + 1)

    def linear(name: str, labels: int, bias: bool = True) -> dict[str, torch.Tensor]:
        weight = torch.randn(labels, hidden, generator=draw) / hidden**0.5
        return {f"{name}.weight": weight} | ({f"{name}.bias": torch.randn(labels, generator=draw)} if bias else {})

    if layout.head == "v_head":
        rewrite(folder, lambda tensors: tensors.update(linear("v_head.summary", 1)))
    elif layout.head == "mlp":
        rewrite(folder, lambda tensors: tensors.update(linear("score.0", hidden) | linear("score.2", 2)))
        change_config(folder, architectures=["Qwen2ForProcessRewardModel"])
    elif layout.head == "score_head":
        rewrite(folder, lambda tensors: (tensors.update(linear("score_head", 3, bias=False)), tensors.pop("lm_head.weight")))
        size = "7B" if family.endswith("7b") else "34B"
        change_config(folder, architectures=[f"ReasonEval_{size}"], use_bias=False, bias=False)
    tokenizer.save_pretrained(folder)
    return folder


def change_config(folder: Path, **entries) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
