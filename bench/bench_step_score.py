"""step_score against plain torch: two LM-head rows as labels, and a Qwen2.5-Math-PRM head (inner layer).

Bytes counted: the hidden rows read, and each weight once. "full" is what serving stacks do for an LM-head
PRM: the head over every token (here over a 32k vocabulary, 512 tokens), then a pick.
"""

import pytest
import torch

from ttskernels import _dispatch
from ttskernels.ops.step_score import step_score

TOKENS, DIM = 512, 1536
IMPLS = ["reference", *(["cpu"] if _dispatch.load_extension() is None else [])]


def make(n, inner, dtype=torch.bfloat16):
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, DIM, dtype=dtype)
    rows = torch.linspace(0, TOKENS - 1, n).to(torch.int32)
    heads = {"weight": torch.randn(2, inner or DIM, dtype=dtype), "norm_weight": torch.ones(DIM, dtype=dtype)}
    heads["mix"] = torch.tensor([0.0, 1.0])
    if inner:
        heads["inner_weight"] = torch.randn(inner, DIM, dtype=dtype) / DIM**0.5
    return hidden, rows, heads


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("inner", [0, DIM])
@pytest.mark.parametrize("n", [1, 16, 192])
def bench_step_score(benchmark, annotate, n, inner, impl):
    hidden, rows, heads = make(n, inner)
    benchmark(step_score, hidden, rows, impl=impl, **heads)
    weights = sum(w.nbytes for w in heads.values())
    annotate(
        num_bytes=n * DIM * 2 + weights, flops=2 * n * sum(w.numel() for w in heads.values() if w.ndim == 2)
    )


def bench_full_logits(benchmark, annotate):
    hidden, rows, _ = make(16, 0)
    lm_head = torch.randn(32_000, DIM, dtype=torch.bfloat16)

    def work():
        return torch.softmax((hidden @ lm_head.T)[rows.long()][:, [648, 387]].float(), -1)[:, 0]

    benchmark.pedantic(work, rounds=3, warmup_rounds=1)
    annotate(flops=2 * TOKENS * DIM * 32_000)
