import pytest
import torch

from ttskernels.ops.page_copy import page_copy


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("k_dim, v_dim", [(16, 16), (80, 48)])
def test_page_copy(impl, dtype, k_dim, v_dim):
    pools = [torch.randn(3, 9, 16, 2, d).to(dtype) for d in (k_dim, v_dim)]
    pools[1] = pools[1].transpose(2, 3).contiguous().transpose(2, 3)  # heads before tokens
    want = [p.clone() for p in pools]
    pairs = [(0, 5, 3), (0, 6, 16), (2, 7, 1), (3, 8, 0)]
    for source, target, tokens in pairs:
        for pool in want:
            for token in range(tokens):
                pool[:, target, token] = pool[:, source, token]
    page_copy(*pools, torch.tensor(pairs, dtype=torch.int32), impl=impl)
    assert torch.equal(pools[0], want[0]) and torch.equal(pools[1], want[1])
    page_copy(*pools, torch.zeros(0, 3, dtype=torch.int32), impl=impl)
    assert torch.equal(pools[0], want[0])


def test_page_copy_invalid():
    k, v = torch.randn(1, 4, 16, 2, 8), torch.randn(1, 4, 16, 2, 8)
    pairs = torch.tensor([[0, 1, 16]], dtype=torch.int32)
    with pytest.raises(ValueError, match="with equal first four"):
        page_copy(k, v[:, :3], pairs)
    with pytest.raises(ValueError, match=r"pairs must be int32 \[n, 3\]"):
        page_copy(k, v, pairs.long())
    with pytest.raises(ValueError, match=r"pages in 0..3 and at most 16 tokens, got \[\[0, 4, 16\]\]"):
        page_copy(k, v, torch.tensor([[0, 4, 16]], dtype=torch.int32))
    with pytest.raises(ValueError, match="last stride of the pools must be 1"):
        page_copy(k.transpose(3, 4), v.transpose(3, 4), pairs)
