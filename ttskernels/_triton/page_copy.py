"""Copy of the first tokens of pages to other pages, for every layer, K and V, in one launch."""

import triton
import triton.language as tl
from torch import Tensor

from ttskernels._triton.on_device import on_device


@triton.jit
def page_copy_kernel(
    k_pool, v_pool, pairs,  # [layers, pages, page_size, kv_heads, dim]; pairs [n, 3] (from, to, tokens)
    k_layer, k_page, k_slot, k_head, v_layer, v_page, v_slot, v_head,  # strides in elements
    K_DIM: tl.constexpr, V_DIM: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pair, layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    source, target = tl.load(pairs + pair * 3).to(tl.int64), tl.load(pairs + pair * 3 + 1).to(tl.int64)
    tokens = tl.load(pairs + pair * 3 + 2)
    for i in range(0, tokens * KV_HEADS * K_DIM, BLOCK):
        at = i + tl.arange(0, BLOCK)
        token, head, d = at // (KV_HEADS * K_DIM), at // K_DIM % KV_HEADS, at % K_DIM
        offset = layer * k_layer + token * k_slot + head * k_head + d
        value = tl.load(k_pool + source * k_page + offset, mask=token < tokens)
        tl.store(k_pool + target * k_page + offset, value, mask=token < tokens)
    for i in range(0, tokens * KV_HEADS * V_DIM, BLOCK):
        at = i + tl.arange(0, BLOCK)
        token, head, d = at // (KV_HEADS * V_DIM), at // V_DIM % KV_HEADS, at % V_DIM
        offset = layer * v_layer + token * v_slot + head * v_head + d
        value = tl.load(v_pool + source * v_page + offset, mask=token < tokens)
        tl.store(v_pool + target * v_page + offset, value, mask=token < tokens)


@on_device
def page_copy(k_pool: Tensor, v_pool: Tensor, pairs: Tensor) -> None:
    layers, _, _, kv_heads, k_dim = k_pool.shape
    if len(pairs) == 0 or layers == 0:
        return
    page_copy_kernel[(len(pairs), layers)](
        k_pool, v_pool, pairs, *k_pool.stride()[:4], *v_pool.stride()[:4],
        k_dim, v_pool.shape[4], kv_heads, 1024, num_warps=4,
    )  # fmt: skip
