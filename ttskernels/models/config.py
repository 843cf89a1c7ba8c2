"""What the decoder needs to know about a checkpoint: sizes, rotary frequencies, which biases and norms exist."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ttskernels.kv.plan_layout import HeadShape
from ttskernels.layout import FIXED, FLOAT8, PAGE_SIZE, fixed_run

FlopsOutput = Literal["logits", "hidden", "kv"]
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
LENGTH_ROPE_TYPES = ("dynamic", "longrope", "su")  # "su" is an old name of longrope


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelConfig:
    """What the engine and the planner need to know of a model."""

    vocab: int
    hidden: int
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    dtype: torch.dtype
    eos_ids: tuple[int, ...]
    model_type: str
    kv_form: str = "float"  # of the pages, see `PagePool`

    @property
    def heads(self) -> HeadShape:
        """What the planner needs to know."""
        width = self._kv_width_bytes / self.head_dim
        return HeadShape(self.q_heads, self.kv_heads, self.head_dim, self.head_dim, width)

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self._kv_width_bytes

    @property
    def _kv_width_bytes(self) -> int:
        """Of one token's K or V of one head: its elements, or integers and a scale."""
        if self.kv_form in FIXED:
            return fixed_run(self.head_dim, FIXED[self.kv_form]) * FIXED[self.kv_form].itemsize // PAGE_SIZE
        return self.head_dim * FLOAT8.get(self.kv_form, self.dtype).itemsize

    def attention_products(self, first: int, rows: int, window: int) -> int:
        """Multiply-adds of one layer's attention for `rows` tokens in a row, the first at a position."""
        whole = min(rows, max(0, window - first)) if window else rows  # rows that see everything before them
        seen = whole * first + whole * (whole + 1) // 2 + (rows - whole) * window
        return 2 * self.q_heads * self.head_dim * seen


@dataclass(frozen=True, eq=False, kw_only=True)
class DecoderConfig(ModelConfig):
    """One decoder-only transformer: pre-norm, rotary positions, grouped queries, gated SiLU MLP."""

    intermediate: int
    rms_eps: float
    inv_freq: Tensor  # [head_dim / 2] float32, scaling included
    rope_scale: float  # multiplies cos and sin (YaRN); 1 otherwise
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool  # RMS norm of every query and key head before the rotation
    tie_embeddings: bool
    window: int  # tokens a row sees, itself included; 0: all
    scale: float  # of the attention logits

    def flops(self, first: int, rows: int = 1, output: FlopsOutput = "logits") -> float:
        """Floating-point operations (2 per multiply-add) of the matrix products of `rows` tokens in a row.

        Args:
            first: position of the first one; a token sees all before it, and itself.
            output: "logits" counts the vocabulary head, "hidden" all layers, and "kv" what a row costs that nobody reads:
                of the last layer its key and value alone.
        """
        queries, keys = self.q_heads * self.head_dim, self.kv_heads * self.head_dim
        values = 2 * self.hidden * keys
        rest = 2 * self.hidden * queries + 3 * self.hidden * self.intermediate
        layers = self.layers - (output == "kv")
        head = self.hidden * self.vocab if output == "logits" else 0
        products = rows * (self.layers * values + layers * rest + head)
        return 2.0 * (products + layers * self.attention_products(first, rows, self.window))


def rope_frequencies(config: Any) -> tuple[Tensor, float]:
    """`(inv_freq [head_dim / 2] float32, scale of cos and sin)` of a transformers config."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        reason = "this decoder does not compute it"
        if kind in LENGTH_ROPE_TYPES:
            reason = (
                "its frequencies change with the length of the sequence, so cached keys of a shared prefix would be wrong"
            )
        raise ValueError(
            f"rope_type must be one of {', '.join(ROPE_TYPES)}, got {kind!r}: {reason}; use a checkpoint without it"
        )
    for name in ("rope_theta", "factor"):
        if not isinstance(rope.get(name, 1.0), int | float):
            raise ValueError(f"{name} of rope_parameters must be a number, got {rope[name]!r}; correct config.json")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"partial_rotary_factor must be 1, got {rope['partial_rotary_factor']}; not supported"
        )
    if kind != "default":
        inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](config)
        return inv_freq.float(), float(scale)
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    return 1.0 / rope["rope_theta"] ** exponent, 1.0


def max_positions(config: Any) -> int:
    """Longest sequence. YaRN checkpoints often keep the unscaled length in max_position_embeddings."""
    rope = config.rope_parameters
    if rope.get("rope_type") == "yarn" and rope.get("factor"):
        return max(
            config.max_position_embeddings, int(rope["factor"] * rope["original_max_position_embeddings"])
        )
    return config.max_position_embeddings
