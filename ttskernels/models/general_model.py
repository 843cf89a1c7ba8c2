"""From a transformers model, loaded or on disk, to a `Model` that runs it over our pages, once it has been checked."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ttskernels._dispatch import available
from ttskernels.models.device import check_device
from ttskernels.models.families import FAMILIES
from ttskernels.models.general import GeneralDecoder, general_config
from ttskernels.models.general_attention import NAME, register
from ttskernels.models.general_check import check_config, check_forks, forward, probe
from ttskernels.models.loading import Checkpoint
from ttskernels.models.model import Kv, Model, check_impl, with_kv
from ttskernels.models.sources import resolve
from ttskernels.models.weights import DTYPES, read_json, some

CHECKED_TOKENS = 11


def general_model(hf, impl: str = "auto", kv: Kv = "auto") -> Model:
    """A causal language model of transformers as a policy, where it is. See `integrations.transformers.as_model`."""
    check_policy(hf)
    where, impl = check_device(hf.device, impl)
    check_impl(impl)
    if impl == "auto":
        impl = "reference" if available("cpu") else "cpu"
    config = hf.config.get_text_config()
    limit = check_config(config)
    ids = [(7 * i + 3) % config.vocab_size for i in range(CHECKED_TOKENS)]
    before, training = config._attn_implementation, hf.training
    hf.eval()
    try:
        hf.set_attn_implementation("eager")
        with torch.no_grad():
            expected = forward(hf, torch.tensor(ids), torch.arange(len(ids))).logits[0, -1].float().cpu()
        register()
        hf.set_attn_implementation(NAME)
        shape = probe(hf, config)
        own = general_config(hf, config, shape, limit, eos_of(hf))
        weights = {"model.embed_tokens.weight": hf.get_input_embeddings().weight.detach()}
        weights["lm_head.weight"] = hf.get_output_embeddings().weight.detach()
        checkpoint = Checkpoint(own, weights, None, Path(hf.name_or_path or "."), True)
        decoder = GeneralDecoder(hf, impl)
        model = Model(with_kv(checkpoint, kv, impl, where), decoder, impl)
        plain = Model(with_kv(checkpoint, "float", impl, where), decoder, impl)  # pages of a byte round more than a check allows
        check_forks(plain, hf, expected, ids)
    except BaseException:
        hf.set_attn_implementation(before)
        hf.train(training)
        raise
    return model


def check_policy(hf) -> None:
    """Raise where a transformers model is no language model in one dtype that kernels know."""
    if getattr(hf, "get_output_embeddings", lambda: None)() is None:
        raise ValueError(f"a policy must have a vocabulary head, got a {type(hf).__name__}; load it with AutoModelForCausalLM")
    dtypes = {str(weight.dtype): weight.dtype for weight in hf.parameters()}
    if len(dtypes) != 1 or not set(dtypes.values()) <= set(DTYPES):
        raise ValueError(f"all weights must be {', '.join(map(str, DTYPES))}, all the same, got {', '.join(sorted(dtypes))}")


def unknown_family(source: str | os.PathLike, dtype: torch.dtype) -> Path | None:
    """Folder of a checkpoint that transformers knows and the fused decoder does not; None for every other source."""
    folder = resolve(source, dtype)
    if not (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        return None
    model_type = read_json(folder / "config.json").get("model_type")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as known

    return folder if isinstance(model_type, str) and model_type not in FAMILIES and model_type in known else None


def load_general(folder: Path, dtype: torch.dtype, impl: str, device: torch.device, kv: Kv) -> Model:
    """Load a language model of a family that the fused decoder does not know.

    Raises:
        ValueError: transformers cannot load it, a weight is missing or of no use, or the model does not pass the checks.
    """
    from transformers import AutoModelForCausalLM

    try:
        hf, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # transformers' own, of many kinds
        reason = " ".join(str(error).split())
        raise ValueError(f"transformers cannot load {folder} ({type(error).__name__}: {reason})") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, info[what])):
            raise ValueError(f"{folder} does not fit its config.json: {what} {some(names)}; download it again")
    return general_model(hf.to(device), impl, kv)


def eos_of(hf) -> tuple[int, ...]:
    """Ids that end what the model writes, as `generate` has them."""
    ids = (hf.generation_config or hf.config.get_text_config()).eos_token_id
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)
