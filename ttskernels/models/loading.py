"""A checkpoint: every expected tensor with its shape, nothing unexpected, no guess and no random head."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ttskernels.models.config import DecoderConfig
from ttskernels.models.families import decoder_config
from ttskernels.models.heads import HeadSpec, ScoreHead, language_model_head
from ttskernels.models.layouts import build_head, head_kind, refuse
from ttskernels.models.lora import Adapter, read_adapter
from ttskernels.models.sources import resolve, resolve_config
from ttskernels.models.weights import DTYPES, main_file, read_json, read_weights, some, weight_files

EMBED, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


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
    *,
    keep_lm_head: bool = False,
    base: str | os.PathLike | None = None,
) -> Checkpoint:
    """Read a checkpoint and convert its weights to `dtype`. Arguments: see `load_model`.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: unsupported family or feature; a weight missing, unexpected or of the wrong shape; a damaged file;
            a `head` the checkpoint cannot have.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    folder = resolve(source, dtype)
    adapter = read_adapter(folder)
    model_folder = folder if adapter is None else _base_model(adapter, base, dtype)
    config_folder = model_folder if adapter is not None else _config_folder(folder, base)
    raw = read_json(config_folder / "config.json")
    refuse(str(source), folder, raw)
    config = decoder_config(raw, dtype, _generation_eos(config_folder))
    tensors = read_weights(weight_files(model_folder))
    if adapter is not None:
        adapter.merge(tensors)
    elif config_folder != folder and EMBED in tensors:  # the base's config.json does not know of added tokens
        config = replace(config, vocab=len(tensors[EMBED]))
    kind = head_kind(raw, tensors)
    weights = _check(config, tensors, kind.names(raw) if kind else (), needs_lm_head=kind is None, folder=folder)
    if kind is not None:
        if keep_lm_head:
            raise ValueError(f"keep_lm_head must be false for {folder}: it has a {kind.name} and is no policy")
        score_head = build_head(kind, tensors, config.hidden, head)
    else:
        _untie(config, weights, folder)
        score_head = None if head is None else language_model_head(head, weights.get(LM_HEAD, weights[EMBED]))
    keep_lm_head = keep_lm_head or score_head is None
    if not keep_lm_head:
        weights.pop(LM_HEAD, None)
    wanted = {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}
    return Checkpoint(config, wanted, score_head, folder, keep_lm_head)


def language_model(
    raw: dict, tensors: Mapping[str, Tensor], dtype: torch.dtype, eos_ids: tuple[int, ...] | None, folder: Path
) -> Checkpoint:
    """A plain language model whose config.json and weights (Hugging Face names) somebody has loaded, from `folder` perhaps.

    Raises:
        ValueError: as `load_checkpoint`.
    """
    config = decoder_config(raw, dtype, eos_ids)
    weights = _check(config, tensors, (), needs_lm_head=True, folder=folder)
    _untie(config, weights, folder)
    return Checkpoint(config, {name: w.to(dtype).contiguous() for name, w in weights.items()}, None, folder, True)


def _base_model(adapter: Adapter, base: str | os.PathLike | None, dtype: torch.dtype) -> Path:
    """Folder of the model that `adapter` is merged into."""
    folder = adapter.folder
    if main := main_file(folder):
        raise ValueError(f"{folder} holds an adapter and {main.name}; keep the adapter, or the whole model, elsewhere")
    if base is None and adapter.base is None:
        raise ValueError(f"base must be the model that the adapter in {folder} belongs to, got None; its config names none")
    if base is None and adapter.revision is not None:
        raise ValueError(
            f"base must be {adapter.base} at revision {adapter.revision}, which the adapter in {folder} belongs to, "
            "got None; download that revision and pass its folder"
        )
    try:
        found = resolve(base or adapter.base, dtype)
    except (FileNotFoundError, ConnectionError) as error:
        if base is not None:
            raise
        raise type(error)(
            f"the adapter in {folder} belongs to {adapter.base}: {error}; pass base= where that model is"
        ) from error
    if not (found / "config.json").is_file():
        raise FileNotFoundError(f"the base model {found} of the adapter in {folder} holds no config.json")
    return found


def _config_folder(folder: Path, base: str | os.PathLike | None) -> Path:
    """Folder with the config.json of the weights in `folder`."""
    if (folder / "config.json").is_file():
        if base is not None:
            raise ValueError(f"base must be None for {folder}, which is a whole checkpoint, got {base}")
        return folder
    if base is None:
        raise FileNotFoundError(
            f"{folder} holds weights but no config.json; copy it from the original checkpoint, or pass as base the model "
            "that was trained on (PQM is published as weights alone)"
        )
    return resolve_config(base)


def _untie(config: DecoderConfig, weights: dict[str, Tensor], folder: Path) -> None:
    """Drop a copy of the embedding; a vocabulary head of its own under tie_word_embeddings is an error."""
    if config.tie_embeddings and LM_HEAD in weights and not _is_copy(weights.pop(LM_HEAD), weights[EMBED]):
        raise ValueError(
            f"{folder}: {LM_HEAD} differs from {EMBED} although tie_word_embeddings is true; "
            f"set it to false in config.json, or remove {LM_HEAD}"
        )


def _is_copy(head: Tensor, embed: Tensor) -> bool:
    """Whether `head` is `embed`, perhaps rounded to a narrower dtype; a damaged weight that is in both is no difference."""
    embed = embed.to(head.dtype)
    return torch.equal(head, embed) or bool(((head == embed) | (head.isnan() & embed.isnan())).all())


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
    shapes = {EMBED: (config.vocab, h), "model.norm.weight": (h,)}
    return shapes | {
        f"model.layers.{i}.{name}": shape for i in range(config.layers) for name, shape in layer.items()
    }


def _check(
    config: DecoderConfig,
    tensors: Mapping[str, Tensor],
    head_names: tuple[str, ...],
    *,
    needs_lm_head: bool,
    folder: Path,
) -> dict[str, Tensor]:
    """The trunk's weights (and the vocabulary head, where there is one) out of exactly those and the score head's."""
    expected = expected_shapes(config)
    if needs_lm_head and not config.tie_embeddings or LM_HEAD in tensors:
        expected[LM_HEAD] = (config.vocab, config.hidden)
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ValueError(
            f"{folder} lacks {some(missing)}, which a {config.model_type} checkpoint with this config.json has"
        )
    if unexpected := sorted(tensors.keys() - expected.keys() - set(head_names)):
        raise ValueError(
            f"{folder} holds {some(unexpected)}, which this decoder would not use; "
            "the checkpoint is of another architecture than its config.json says"
        )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            hint = f"; for added tokens set vocab_size to {len(tensors[name])}" if name in (EMBED, LM_HEAD) else ""
            raise ValueError(
                f"{folder}: {name} must have shape {shape} by config.json, got {tuple(tensors[name].shape)}{hint}"
            )
    return {name: tensors[name] for name in expected}


def _generation_eos(folder: Path) -> tuple[int, ...] | None:
    """End ids of generation_config.json; a chat model's own end of turn is often only there."""
    file = folder / "generation_config.json"
    value = read_json(file).get("eos_token_id") if file.is_file() else None
    if value is None:
        return None
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) for i in ids):
        raise ValueError(f"eos_token_id of {file} must be a token id or a list of them, got {value!r}; correct it")
    return tuple(ids)

