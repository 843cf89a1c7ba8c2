"""refine_logits on vocabularies of two small models: a pass over the logits, and a few of the vocabulary's rows; against topk and
a gathered product in torch."""

import pytest
import torch

from ttskernels import _dispatch
from ttskernels.ops.refine_logits import refine_logits


def in_torch(logits, x, weight):
    top, ids = logits.topk(16, 1)
    exact = torch.bmm(weight[ids].float(), x[:, :, None])[..., 0]
    logits.scatter_(1, ids, torch.where(top >= top[:, :1] - 3, exact, top))


@pytest.mark.parametrize("impl", ["torch", *(["cpu"] if _dispatch.load_extension() is None else [])])
@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("vocab, dim", [(49152, 576), (151936, 896)])
def bench_refine_logits(benchmark, annotate, vocab, dim, rows, impl):
    x, weight = torch.randn(rows, dim), torch.randn(vocab, dim, dtype=torch.bfloat16)
    logits = 0.1 * (x.bfloat16() @ weight.T).float()
    if impl == "torch":
        benchmark(in_torch, logits, x, weight)
    else:
        benchmark(refine_logits, logits, x, weight, impl=impl)
    annotate(num_bytes=rows * (vocab * 4 + 16 * dim * 2))
