"""Weights from safetensors: every expected tensor with its shape, nothing unexpected, no guess and no random head."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttskernels.models.config import DecoderConfig
from ttskernels.models.families import decoder_config
from ttskernels.models.heads import HeadKind, HeadSpec, ScoreHead, build_head, head_kind, language_model_head
from ttskernels.models.sources import resolve

DTYPES = (torch.bfloat16, torch.float32, torch.float16)


@dataclass(eq=False)
class Checkpoint:
    """A loaded model. `weights` has Hugging Face names; `lm_head.weight` only when it is untied and used."""

    config: DecoderConfig
    weights: dict[str, Tensor]
    head: ScoreHead | None
    folder: Path
    keeps_lm_head: bool  # the vocabulary head is wanted: untied in `weights`, or the embedding


def load_checkpoint(
    source: str | os.PathLike,
    dtype: torch.dtype = torch.bfloat16,
    head: HeadSpec | None = None,
    keep_lm_head: bool = False,
) -> Checkpoint:
    """Read a checkpoint folder, hub id or GGUF file and convert its weights to `dtype`. `head`: see `load_model`.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: unsupported family or feature; a weight missing, unexpected or of the wrong shape; a damaged file;
            a `head` the checkpoint cannot have.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    folder = resolve(source, dtype)
    raw = _read_json(folder / "config.json")
    config = decoder_config(raw, dtype, _generation_eos(folder))
    files = _weight_files(folder)
    names = {
        name: file for file in files for name in _names(file) if not name.endswith("rotary_emb.inv_freq")
    }
    kind = head_kind((raw.get("architectures") or [""])[0], names)
    tensors = _read(names)
    weights = _check(config, tensors, kind, folder)
    if config.tie_embeddings and "lm_head.weight" in weights:
        if not torch.equal(weights.pop("lm_head.weight"), weights["model.embed_tokens.weight"]):
            raise ValueError(
                f"{folder}: lm_head.weight differs from model.embed_tokens.weight although "
                "tie_word_embeddings is true; "
                "set it to false in config.json, or remove lm_head.weight"
            )
    score_head = None
    if kind is not None:
        if keep_lm_head:
            raise ValueError(f"keep_lm_head must be false for {folder}: it has a {kind.name} and is no policy")
        score_head = build_head(kind, tensors, config.hidden, head)
    elif head is not None:
        score_head = language_model_head(head, weights.get("lm_head.weight", weights["model.embed_tokens.weight"]))
    keep_lm_head = keep_lm_head or score_head is None
    if not keep_lm_head:
        weights.pop("lm_head.weight", None)
    wanted = {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}
    return Checkpoint(config, wanted, score_head, folder, keep_lm_head)


def expected_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every weight of the trunk, by Hugging Face name."""
    h, inner = config.hidden, config.intermediate
    queries, keys = config.q_heads * config.head_dim, config.kv_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (h,),
        "self_attn.q_proj.weight": (queries, h),
        "self_attn.k_proj.weight": (keys, h),
        "self_attn.v_proj.weight": (keys, h),
        "self_attn.o_proj.weight": (h, queries),
        "post_attention_layernorm.weight": (h,),
        "mlp.gate_proj.weight": (inner, h),
        "mlp.up_proj.weight": (inner, h),
        "mlp.down_proj.weight": (h, inner),
    }
    if config.qkv_bias:
        layer |= {f"self_attn.{p}_proj.bias": (n,) for p, n in (("q", queries), ("k", keys), ("v", keys))}
    if config.o_bias:
        layer["self_attn.o_proj.bias"] = (h,)
    if config.qk_norm:
        layer |= {f"self_attn.{p}_norm.weight": (config.head_dim,) for p in "qk"}
    shapes = {"model.embed_tokens.weight": (config.vocab, h), "model.norm.weight": (h,)}
    return shapes | {
        f"model.layers.{i}.{name}": shape for i in range(config.layers) for name, shape in layer.items()
    }


def _check(
    config: DecoderConfig, tensors: Mapping[str, Tensor], kind: HeadKind | None, folder: Path
) -> dict[str, Tensor]:
    expected = expected_shapes(config)
    head_names = set(kind.names()) if kind else set()
    lm_head = (config.vocab, config.hidden)
    if kind is None and not config.tie_embeddings or "lm_head.weight" in tensors:
        expected["lm_head.weight"] = lm_head
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ValueError(
            f"{folder} lacks {_some(missing)}, which a {config.model_type} checkpoint with this config.json has"
        )
    if unexpected := sorted(tensors.keys() - expected.keys() - head_names):
        raise ValueError(
            f"{folder} holds {_some(unexpected)}, which this decoder would not use; "
            "the checkpoint is of another architecture than its config.json says, or has an adapter to be merged first"
        )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"{folder}: {name} must have shape {shape} by config.json, got {tuple(tensors[name].shape)}"
            )
    return {name: tensors[name] for name in expected}


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        files = [folder / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(
                    f"{file} is named by {index.name} but is missing; the download is incomplete"
                )
        return files
    found = sorted(folder.glob("*.safetensors"))
    if (folder / "adapter_config.json").is_file() or len(found) != 1:
        raise FileNotFoundError(
            f"{folder} must hold model.safetensors or model.safetensors.index.json, "
            f"got {_some([f.name for f in found])}; "
            "merge an adapter into its base model first (merge_and_unload, save_pretrained)"
        )
    return found


def _names(file: Path) -> list[str]:
    with _open(file) as handle:
        return list(handle.keys())


def _read(names: Mapping[str, Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(names.values())):
        with _open(file) as handle:
            for name in handle.keys():
                if name in names:
                    tensors[name] = handle.get_tensor(name)
                    if tensors[name].dtype not in (*DTYPES, torch.float64):
                        raise ValueError(
                            f"{file}: {name} must be a 16, 32 or 64-bit float, got {tensors[name].dtype}; "
                            "use the unquantised checkpoint"
                        )
    return tensors


def _open(file: Path):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a complete safetensors file ({error}); download it again") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); download it again") from error


def _generation_eos(folder: Path) -> tuple[int, ...] | None:
    """End ids of generation_config.json; a chat model's own end of turn is often only there."""
    file = folder / "generation_config.json"
    value = _read_json(file).get("eos_token_id") if file.is_file() else None
    if value is None:
        return None
    return (value,) if isinstance(value, int) else tuple(value)


def _some(names: list[str], limit: int = 3) -> str:
    shown = ", ".join(names[:limit]) or "nothing"
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
