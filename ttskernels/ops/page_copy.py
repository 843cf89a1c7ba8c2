"""Batched page copy, for engines whose sharing must be page-aligned: a fork copies the partial last page."""

import torch
from torch import Tensor

from ttskernels._dispatch import Impl, resolve
from ttskernels._reference import page_copy as reference


def page_copy(k_pool: Tensor, v_pool: Tensor, pairs: Tensor, *, impl: Impl = "auto") -> None:
    """Copy the first tokens of pages to other pages, in every layer, K and V, in one launch.

    Our own forest never needs it: its forks share partial pages. On the CPU it is PyTorch's at every `impl`. impl "cuda"
    goes through a table of addresses, which an engine with a tensor for each layer can keep (`_cuda.page_copy.pool_table`).

    Args:
        k_pool, v_pool: `[layers, pages, page_size, kv_heads, dim]`, any strides with the last 1; modified.
        pairs: `[n, 3]` int32 (from page, to page, tokens); no page is a target twice, or both a target and a source.
    Raises:
        ValueError: shape, dtype or device mismatch. (Page numbers are unchecked on a GPU: that would synchronise.)
    """
    if k_pool.ndim != 5 or v_pool.ndim != 5 or k_pool.shape[:4] != v_pool.shape[:4]:
        raise ValueError(
            "k_pool and v_pool must be [layers, pages, page_size, kv_heads, dim] with equal first four, "
            f"got {tuple(k_pool.shape)} and {tuple(v_pool.shape)}"
        )
    if k_pool.stride(4) != 1 or v_pool.stride(4) != 1:
        raise ValueError(f"the last stride of the pools must be 1, got {k_pool.stride(4)} and {v_pool.stride(4)}")
    if pairs.ndim != 2 or pairs.shape[1] != 3 or pairs.dtype != torch.int32:
        raise ValueError(f"pairs must be int32 [n, 3], got {pairs.dtype} {tuple(pairs.shape)}")
    if not k_pool.device == v_pool.device == pairs.device:
        raise ValueError(f"pools and pairs must be on one device, got {k_pool.device}, {v_pool.device}, {pairs.device}")
    if pairs.device.type == "cpu" and len(pairs):
        pages, size = k_pool.shape[1:3]
        if int(pairs.min()) < 0 or int(pairs[:, :2].max()) >= pages or int(pairs[:, 2].max()) > size:
            raise ValueError(f"pairs must name pages in 0..{pages - 1} and at most {size} tokens, got {pairs.tolist()}")
    chosen = resolve(impl, k_pool)
    if chosen == "cuda":
        from ttskernels._cuda.page_copy import page_copy as launch
    elif chosen == "triton":
        from ttskernels._triton.page_copy import page_copy as launch
    else:
        return reference.page_copy(k_pool, v_pool, pairs)

    return launch(k_pool, v_pool, pairs.contiguous())
