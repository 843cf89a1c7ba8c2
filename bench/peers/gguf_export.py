"""Write a Llama or Qwen2 checkpoint of Hugging Face's layout as a .gguf file in bf16 or Q8_0, without a tokenizer.

    python bench/peers/gguf_export.py FOLDER FILE.gguf --precision q8_0

llama.cpp rotates neighbouring pairs where Hugging Face rotates halves: for the architecture `llama` the rows of q and k are
permuted, head by head. Norms and biases stay float32. Tied embeddings are written once.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2"}
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`."""
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, stem = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[stem]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def to_pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k (weight or bias) from rotated halves to rotated neighbours."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def to_halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `to_pairs`."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def export(folder: Path, file: Path, precision: str) -> None:
    """Write `file`; `precision` is "bf16" or "q8_0".

    Raises:
        ValueError: an architecture that this file does not know.
    """
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] not in ARCHITECTURES:
        raise ValueError(f"model_type must be one of {', '.join(ARCHITECTURES)}, got {config['model_type']!r}")
    arch = ARCHITECTURES[config["model_type"]]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or config
    writer = gguf.GGUFWriter(file, arch)
    writer.add_name(folder.name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(dim)
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if precision == "bf16" else gguf.LlamaFileType.MOSTLY_Q8_0)
    wide = {"bf16": Kind.BF16, "q8_0": Kind.Q8_0}[precision]
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        tensor = tensor.float()
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            tensor = to_pairs(tensor, heads if ".q_proj." in name else kv_heads)
        kind = wide if tensor.ndim == 2 else Kind.F32
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--precision", choices=("bf16", "q8_0"), default="bf16")
    args = parser.parse_args()
    export(args.folder, args.file, args.precision)
