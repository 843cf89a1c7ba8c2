"""Tiny random chat models that write: a tokenizer with stop texts and choices as tokens of their own, often sampled."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from tiny_models import randomize
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

SPECIAL = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
WORDS = [" yes", " no", "Yes", "No", "Is the solution", " correct?", "</think>", "</analyze>\n", "</output>\n", "\\boxed{", "}x"]
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokens = [*WORDS, *(chr(c) for c in range(32, 127)), "\n"]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="~"))
    words = "|".join(re.escape(word) for word in WORDS)
    core.pre_tokenizer = pre_tokenizers.Split(Regex(f"{words}|[\\s\\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", unk_token="~")
    made.chat_template = CHAT
    return made


def write_chat_model(folder: Path, seed: int = 0, positions: int = 4096, **often: float) -> torch.nn.Module:
    """Save a model and its tokenizer; `often` scales the vocabulary rows of tokens, so that they are sampled more."""
    tokenizer = chat_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=positions, tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, attn_implementation="eager",
    )  # fmt: skip
    model = randomize(AutoModelForCausalLM.from_config(config).float().eval(), seed)
    with torch.no_grad():
        for word, factor in often.items():
            model.lm_head.weight[tokenizer.convert_tokens_to_ids(word)] *= factor
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model
