"""A model from a checkpoint: run by the fused decoder, or, of a family that it does not know, by transformers' own modules."""

from __future__ import annotations

import os

import torch

from ttskernels import _dispatch
from ttskernels.models.device import check_device
from ttskernels.models.general_model import load_general, unknown_family
from ttskernels.models.heads import HeadSpec
from ttskernels.models.loading import load_checkpoint
from ttskernels.models.model import Kv, Model, Weights, check_impl, make_decoder, with_kv


def load_model(
    source: str | os.PathLike,
    dtype: torch.dtype = torch.bfloat16,
    impl: _dispatch.Impl = "auto",
    head: HeadSpec | None = None,
    *,
    keep_lm_head: bool = False,
    base: str | os.PathLike | None = None,
    device: str | torch.device = "cpu",
    weights: Weights = "auto",
    kv: Kv = "auto",
) -> Model:
    """Load a policy or process reward model.

    Args:
        source: checkpoint folder (safetensors or pytorch_model.bin; or a LoRA adapter, which is merged into its base),
            hub id `owner/name`, `.gguf` file or a folder with one.
        dtype: bf16, fp32 or fp16; weights are converted, KV has the same dtype unless `kv` says otherwise.
        impl: "auto" takes the C++ decoder when the extension is loaded; "reference" is plain PyTorch; "triton" is the GPU's.
        head: how scores are read. None: as the checkpoint's own kind says; a plain language model has no head. Rows or
            the mean of the vocabulary make a head of a plain language model, whose vocabulary head is then not kept.
        keep_lm_head: keep it nevertheless: the model is a policy, too.
        base: the base model of an adapter (None: the one its adapter_config.json names), or of a checkpoint that is
            published without a config.json (PQM; only the base's config.json is read).
        device: "cpu", or "cuda" (`impl` "auto" or "triton") for weights, KV and every kernel on a GPU.
        weights: how matrices are kept and multiplied on a CPU, see `linear_pack`: "float" in `dtype`; "int16" as accurate
            as bf16 arithmetic and up to twice as fast where the CPU has no fast bf16 products; "int8" in half the bytes
            and up to twice as fast again, at a small loss of accuracy (bench/int8_accuracy.py measures it; k, v and down
            stay in two bytes, and the likeliest logits are refined, see `refine_logits`); "calibrated" the same with
            these in int8, too, faster at about the same loss, once `calibrate` has rounded the weights. "auto": "int16"
            for bf16 models where it is the faster one.
        kv: how K and V are kept: "float" in `dtype`; on a CPU "int16" or "int8" in fixed point, see `PagePool`: attention
            then runs on integer products, and "int8" takes about half the bytes; on a GPU "fp8" (float8_e4m3fn), half the
            bytes of bf16 at a loss of accuracy, where beyond 448 K and V become that. "auto": on a CPU as for `weights`.
    Raises:
        FileNotFoundError, ConnectionError: nothing to load there.
        ValueError: unsupported family or feature, incomplete or damaged files, a `head` the checkpoint cannot have; the
            message names which.
        UnavailableError: `impl` or `device` cannot run here.
    """
    where, impl = check_device(device, impl)
    check_impl(impl)
    if head is None and weights in ("auto", "float") and (folder := unknown_family(source, dtype)) is not None:
        return load_general(folder, dtype, impl, where, kv)
    checkpoint = load_checkpoint(source, dtype, head, keep_lm_head=keep_lm_head, base=base)
    checkpoint = with_kv(checkpoint, kv, impl, where)
    return Model(checkpoint, *make_decoder(checkpoint, impl, lm_head=checkpoint.keeps_lm_head, device=where, weights=weights))
