"""Log-probabilities of given tokens, from hidden states, without logits."""

import torch
from torch import Tensor

from ttskernels._dispatch import Impl, resolve
from ttskernels._reference import token_logprob as reference
from ttskernels.ops.linear import DTYPES, PackedLinear


def token_logprob(
    hidden: Tensor,
    rows: Tensor,
    lm_head: Tensor | PackedLinear,
    ids: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    impl: Impl = "auto",
) -> Tensor:
    """`log_softmax(norm(hidden[rows]) @ lm_head.T)[ids]`: gather, RMS norm, vocabulary head and an online
    log-sum-exp over it, one pass; no tensor of `n * vocab` values exists.

    Args:
        hidden: `[tokens, dim]`, fp32 / fp16 / bf16, before the final norm; not modified.
        rows: `[n]` int32, row of `hidden` whose next token is asked for; a row may occur often.
        lm_head: `[vocab, dim]`, any of the three dtypes, or `linear_pack` of it (form "float"). Packed is faster for few
            rows; plain needs no copy of the matrix. Both give the same bits.
        ids: `[n]` int32, the token whose log-probability is wanted.
        norm_weight: `[dim]` of the final norm; None if `hidden` is normed already.
        impl: of a plain `lm_head`; a packed one runs in the implementation it was packed for.
    Returns:
        `[n]` float32, natural log; on the CPU a row's value has the same bits in any batch. Empty `rows` gives an empty
        tensor. On a GPU rows and ids are not checked (that would synchronise), and a row without a finite value is NaN.
    Raises:
        ValueError: shape or dtype mismatch, a row outside `hidden`, an id outside the vocabulary, or hidden states that
            are not finite.
    Source: Milakov and Gimelshein 2018, arXiv:1805.02867 (online softmax).
    """
    packed = isinstance(lm_head, PackedLinear)
    if packed and lm_head.form != "float":
        raise ValueError(f"lm_head must be packed with form='float', got {lm_head.form!r}; pass the matrix, or pack it so")
    vocab, dim = (lm_head.out_features, lm_head.in_features) if packed else _shape(lm_head)
    _check(hidden, rows, ids, norm_weight, vocab, dim)
    chosen = lm_head.impl if packed else resolve(impl, hidden)
    if packed and impl not in ("auto", chosen):
        raise ValueError(f"lm_head was packed for impl {chosen!r}, got impl={impl!r}; pass impl='auto' or pack it anew")
    weight = lm_head.data if packed else lm_head
    if weight.device != hidden.device:
        raise ValueError(f"lm_head must be on hidden's device {hidden.device}, got {weight.device}")
    if chosen != "reference":
        for name, dtype in (("hidden", hidden.dtype), ("lm_head", lm_head.dtype)):
            if dtype not in DTYPES:
                raise ValueError(f"{name} must be float32, float16 or bfloat16, got {dtype}; pass impl='reference'")
        hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
        weight = weight.contiguous() if weight.ndim == 2 and weight.stride(1) != 1 else weight
        rows, ids = rows.contiguous(), ids.contiguous()
    if chosen == "cpu":
        norm = None if norm_weight is None else norm_weight.float().contiguous()
        logprobs = torch.ops.ttskernels.token_logprob(hidden, rows, norm, eps, weight, vocab, lm_head.dtype, ids)
    elif chosen == "triton":
        from ttskernels._triton.token_logprob import token_logprob as launch

        logprobs = launch(hidden, rows, None if norm_weight is None else norm_weight.contiguous(), eps, weight, ids)
    else:
        logprobs = reference.token_logprob(hidden, rows, norm_weight, eps, weight, ids)
    if hidden.device.type != "cpu":
        return logprobs
    finite = logprobs.isfinite()
    if not finite.all():
        i = int(finite.logical_not().nonzero()[0])
        raise ValueError(
            f"hidden row {int(rows[i])} (rows[{i}]) has no finite log-probability of id {int(ids[i])}: "
            "its hidden states or logits are not finite; check the model's dtype (fp16 overflows) and inputs"
        )
    return logprobs


def _shape(lm_head: Tensor) -> tuple[int, int]:
    if lm_head.ndim != 2 or 0 in lm_head.shape:
        raise ValueError(f"lm_head must be [vocab, dim], both at least 1, got {tuple(lm_head.shape)}")
    return lm_head.shape[0], lm_head.shape[1]


def _check(hidden: Tensor, rows: Tensor, ids: Tensor, norm_weight: Tensor | None, vocab: int, dim: int) -> None:
    if hidden.ndim != 2 or hidden.shape[1] != dim or not hidden.is_floating_point():
        raise ValueError(
            f"hidden must be floating point [tokens, {dim}] for this lm_head, got {hidden.dtype} {tuple(hidden.shape)}"
        )
    for name, index, size in (("rows", rows, hidden.shape[0]), ("ids", ids, vocab)):
        if index.ndim != 1 or index.dtype != torch.int32:
            raise ValueError(
                f"{name} must be int32 [n], got {index.dtype} {tuple(index.shape)}; pass {name}.to(torch.int32)"
            )
        if index.device.type == "cpu" and index.numel() and not 0 <= int(index.min()) <= int(index.max()) < size:
            raise ValueError(f"{name} must be in 0..{size - 1}, got {int(index.min())}..{int(index.max())}")
    if len(rows) != len(ids):
        raise ValueError(f"ids must have one id per row, got {len(ids)} for {len(rows)} rows")
    if norm_weight is not None and norm_weight.shape != (dim,):
        raise ValueError(f"norm_weight must be [{dim}], got {tuple(norm_weight.shape)}")
