"""A tiny checkpoint of every PRM family: published layout, random weights, a tokenizer that behaves like the real one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import prm_checkpoints
import tiny_tokenizers
import torch
from prm_checkpoints import PlainPrm
from tiny_models import config_of

from ttskernels.models import Model, load_model

SIZES = {"max_position_embeddings": 1024, "num_attention_heads": 2, "num_key_value_heads": 1}


@dataclass(frozen=True)
class Layout:
    write: Callable[..., PlainPrm]
    variant: str  # of tiny_models
    tokenizer: Callable[[], object]
    config: dict = field(default_factory=dict)


def causal(variant: str, tokenizer) -> Layout:
    return Layout(prm_checkpoints.write_causal_lm, variant, tokenizer)


def classifier(variant: str, tokenizer, labels: int) -> Layout:
    return Layout(prm_checkpoints.write_token_classifier, variant, tokenizer, {"num_labels": labels})


LAYOUTS = {
    "math-shepherd": causal("mistral_full", tiny_tokenizers.mistral),
    "mathminos": classifier("mistral_full", tiny_tokenizers.mistral, 1),
    "rlhflow-mistral": causal("llama", tiny_tokenizers.llama3),
    "rlhflow-deepseek": causal("llama_rope3_bias", tiny_tokenizers.llama3),
    "skywork": Layout(prm_checkpoints.write_skywork, "qwen2", lambda: tiny_tokenizers.qwen("<|im_start|>")),
    "qwen-math-prm": Layout(prm_checkpoints.write_qwen_prm, "qwen2", lambda: tiny_tokenizers.qwen(None, "<extra_0>")),
    "math-psa": Layout(prm_checkpoints.write_math_psa, "qwen2", tiny_tokenizers.qwen),
    "er-prm": causal("llama", tiny_tokenizers.llama3),
    "versaprm": causal("llama", tiny_tokenizers.llama3),
    "versaprm-qwen": causal("qwen2", tiny_tokenizers.qwen),
    "pqm": Layout(prm_checkpoints.write_pqm, "llama", tiny_tokenizers.deepseek),
    "trl": classifier("qwen2", tiny_tokenizers.qwen, 2),
    "trl-blank-line": classifier("llama", tiny_tokenizers.llama3, 2),
    "pure": classifier("qwen2", tiny_tokenizers.qwen, 2),
    "llemma": causal("llama", tiny_tokenizers.mistral),
    "rebase": causal("llama", tiny_tokenizers.mistral),
    "reasoneval-7b": Layout(
        prm_checkpoints.write_reason_eval, "mistral_full", lambda: tiny_tokenizers.mistral("<s>"), {"use_bias": True}
    ),
    "reasoneval-34b": Layout(prm_checkpoints.write_reason_eval, "llama", tiny_tokenizers.mistral),
}


def tokenizer_of(family: str):
    return LAYOUTS[family].tokenizer()


def write_prm(folder: Path, family: str, seed: int = 0) -> Path:
    """Config, weights and tokenizer files of a random PRM of `family`."""
    build_prm(folder, family, seed)
    return folder


def build_prm(folder: Path, family: str, seed: int = 0) -> PlainPrm:
    """The same, and the model as plain PyTorch."""
    layout, tokenizer = LAYOUTS[family], tokenizer_of(family)
    sizes = SIZES | {"vocab_size": len(tokenizer) + 3} | layout.config  # real vocabularies are padded too
    if layout.variant == "qwen2":
        sizes |= {"hidden_size": 128}
    plain = layout.write(folder, config_of(layout.variant, **sizes), seed)
    tokenizer.save_pretrained(folder)
    return plain


def load_prm(folder: Path, dtype: torch.dtype, head) -> Model:
    """Our model of it; PQM is published without a config.json."""
    base = None if (folder / "config.json").exists() or (folder / "adapter_config.json").exists() else folder / "base"
    return load_model(folder, dtype, head=head, base=base)


class PlainIn:
    """A plain PRM in some dtype, one sequence at a time."""

    def __init__(self, plain: PlainPrm, dtype: torch.dtype = torch.float32):
        self.plain = PlainPrm(copy.deepcopy(plain.trunk).to(dtype), copy.deepcopy(plain.head).to(dtype))

    def logits(self, ids: list[int]) -> torch.Tensor:
        """`[tokens, labels]`, or over the vocabulary for a language model."""
        return self.plain.logits(torch.tensor([ids]))[0]
