"""A small batched sampler for the training recipe: plain PyTorch, preallocated cache, not the engine."""

import json
import math
from pathlib import Path

import torch
from torch.nn import functional as F

from .tokenizer import EOS_ID

MAX_NEW_TOKENS = 132  # the longest right solution has 117
PROMPTS_AT_ONCE = 200  # between two writes of `sample_to_file`


class CachedDecoder:
    """Runs the weights of a `LlamaForCausalLM` one token at a time for rows of equal length."""

    def __init__(self, model, rows: int, capacity: int):
        config = model.config
        self.model, self.head_dim = model.model, config.head_dim
        self.embedding = model.model.embed_tokens.weight
        self.kv_heads = config.num_key_value_heads
        self.length = 0
        shape = (config.num_hidden_layers, rows, self.kv_heads, capacity, self.head_dim)
        self.keys, self.values = torch.empty(shape), torch.empty(shape)
        self.cos, self.sin = model.model.rotary_emb(torch.empty(1, 1), torch.arange(capacity)[None])

    def keep(self, rows: torch.Tensor) -> None:
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of the last position. `ids`: [rows, tokens]; several tokens only at the very start."""
        rows, tokens = ids.shape
        end = self.length + tokens
        cos, sin = self.cos[0, self.length : end], self.sin[0, self.length : end]
        hidden = self.embedding[ids]
        for index, layer in enumerate(self.model.layers):
            x = layer.input_layernorm(hidden)
            attention = layer.self_attn
            query = _rotate(self._heads(attention.q_proj(x)), cos, sin)
            self.keys[index, :, :, self.length : end] = _rotate(self._heads(attention.k_proj(x)), cos, sin)
            self.values[index, :, :, self.length : end] = self._heads(attention.v_proj(x))
            mixed = self._attend(query, self.keys[index, :, :, :end], self.values[index, :, :, :end])
            hidden = hidden + attention.o_proj(mixed)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        self.length = end
        return self.model.norm(hidden[:, -1]) @ self.embedding.T

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _attend(self, query, keys, values) -> torch.Tensor:
        rows, heads, tokens, dim = query.shape
        if tokens > 1:
            out = F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)
        else:
            grouped = query.reshape(rows, self.kv_heads, heads // self.kv_heads, dim)
            weights = torch.softmax(grouped @ keys.transpose(-1, -2) / math.sqrt(dim), dim=-1)
            out = (weights @ values).reshape(rows, heads, 1, dim)
        return out.transpose(1, 2).reshape(rows, tokens, heads * dim)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


@torch.inference_mode()
def sample(
    model, tokenizer, prompts: list[str], *, temperature: float = 1.0, seed: int = 0, rows_at_once: int = 512
) -> list[str]:
    """One solution per prompt; repeat a prompt for more. Temperature 0 is greedy."""
    encoded = [tokenizer(prompt).input_ids for prompt in prompts]
    texts = [""] * len(prompts)
    generator = torch.Generator().manual_seed(seed)
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(encoded):
        by_length.setdefault(len(ids), []).append(index)
    for indices in by_length.values():
        for start in range(0, len(indices), rows_at_once):
            group = indices[start : start + rows_at_once]
            ids = torch.tensor([encoded[i] for i in group])
            for i, new_ids in zip(group, _sample_rows(model, ids, temperature, generator), strict=True):
                texts[i] = tokenizer.decode(new_ids)
    return texts


def sample_to_file(
    model, tokenizer, prompts: list[str], samples: int, seed: int, path: Path
) -> tuple[list[str], list[str]]:
    """`samples` solutions of each prompt, written to `path` as they come; goes on from what is there.

    Returns prompts (each repeated) and solutions, in order.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    done = min(len(prompts), len(lines) // samples)
    if done < len(prompts):
        done -= done % PROMPTS_AT_ONCE  # a half-written chunk is sampled again
        path.write_text("".join(line + "\n" for line in lines[: done * samples]))
    for start in range(done, len(prompts), PROMPTS_AT_ONCE):
        repeated = [prompt for prompt in prompts[start : start + PROMPTS_AT_ONCE] for _ in range(samples)]
        texts = sample(model, tokenizer, repeated, seed=seed * 100_003 + start)
        with path.open("a") as file:
            file.writelines(json.dumps(pair) + "\n" for pair in zip(repeated, texts, strict=True))
        print(
            f"{path.name}: {min(start + PROMPTS_AT_ONCE, len(prompts))} of {len(prompts)} problems",
            flush=True,
        )
    pairs = [json.loads(line) for line in path.read_text().splitlines()]
    return [prompt for prompt, _ in pairs], [text for _, text in pairs]


def _sample_rows(model, ids: torch.Tensor, temperature: float, generator) -> list[list[int]]:
    decoder = CachedDecoder(model, len(ids), ids.shape[1] + MAX_NEW_TOKENS)
    out: list[list[int]] = [[] for _ in range(len(ids))]
    alive = torch.arange(len(ids))
    logits = decoder(ids)
    for _ in range(MAX_NEW_TOKENS):
        if temperature == 0:
            chosen = logits.argmax(-1)
        else:
            chosen = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)[:, 0]
        going = chosen != EOS_ID
        for row, token in zip(alive[going].tolist(), chosen[going].tolist(), strict=True):
            out[row].append(token)
        if not going.any():
            break
        if not going.all():
            decoder.keep(going)
            alive, chosen = alive[going], chosen[going]
        logits = decoder(chosen[:, None])
    return out
