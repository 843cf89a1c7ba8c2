"""token_logprob against plain torch, on the vocabulary heads of two small models; 800 rows are 16 branches x 50 tokens.

"packed" and "plain" are ours with a `linear_pack`ed or an ordinary lm_head. "torch_lse" is the best of torch that keeps
fp32 sums: bf16 logits, then the picked one less logsumexp a row at a time (as TRL's selective log-softmax does);
"torch_softmax" is log_softmax of the float32 logits, then a pick. Bytes counted: lm_head once per 384 rows, and the hidden
rows; `buffer_bytes` is what the variant allocates beside its result.
"""

import functools

import pytest
import torch
from torch.nn.functional import linear

from ttskernels import _dispatch
from ttskernels.ops.linear import linear_pack
from ttskernels.ops.token_logprob import token_logprob

HEADS = {"SmolLM2-135M": (49152, 576), "Qwen2.5-0.5B": (151936, 896)}
OURS = ["packed", "plain"] if _dispatch.load_extension() is None else []
SLICES = 128  # running sums a row


def torch_lse(x, lm_head, ids):
    logits = linear(x, lm_head)
    picked = logits.gather(1, ids[:, None])[:, 0].float()
    return picked - torch.stack([row.float().logsumexp(-1) for row in logits])


def torch_softmax(x, lm_head, ids):
    return linear(x, lm_head).float().log_softmax(-1).gather(1, ids[:, None])[:, 0]


@functools.cache
def lm_head_of(model):
    return torch.randn(HEADS[model], dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0)) / 24


@pytest.mark.parametrize("variant", [*OURS, "reference", "torch_lse", "torch_softmax"])
@pytest.mark.parametrize("n", [1, 16, 50, 800])
@pytest.mark.parametrize("model", HEADS)
def bench_token_logprob(benchmark, annotate, model, n, variant):
    vocab, dim = HEADS[model]
    torch.manual_seed(0)
    hidden, lm_head = torch.randn(n, dim, dtype=torch.bfloat16), lm_head_of(model)
    rows, ids = torch.arange(n, dtype=torch.int32), torch.randint(vocab, (n,), dtype=torch.int32)
    norm = torch.ones(dim, dtype=torch.bfloat16)
    if variant.startswith("torch"):
        function = {"torch_lse": torch_lse, "torch_softmax": torch_softmax}[variant]
        where = ids.long()

        def work():
            return function(torch.nn.functional.rms_norm(hidden, (dim,), norm, 1e-6), lm_head, where)

        buffer = n * vocab * (2 if variant == "torch_lse" else 10)
    else:
        weight = linear_pack(lm_head, impl="cpu") if variant == "packed" else lm_head
        impl = "reference" if variant == "reference" else "auto"

        def work():
            return token_logprob(hidden, rows, weight, ids, norm_weight=norm, impl=impl)

        own = n * (dim * 4 + SLICES * 8) if variant != "reference" else 4 * (n * (dim + 4096) + 4096 * dim)
        buffer = own + (torch.get_num_threads() * 64 * dim * 2 if variant == "plain" else 0)
    benchmark.pedantic(work, rounds=3 if n == 800 else 9, warmup_rounds=1)
    num_bytes = -(-n // 384) * lm_head.nbytes + hidden.nbytes
    annotate(num_bytes=num_bytes, flops=2 * n * vocab * dim, buffer_bytes=buffer)
