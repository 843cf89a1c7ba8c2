"""Batched page copy over a table of pools: engines keep K and V of every layer in tensors of their own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ttskernels._cuda import call


def pool_table(pools: Sequence[Tensor]) -> Tensor:
    """`[pools, 8]` int64 on the pools' device (PagePoolView, csrc/include/ttskernels/page_copy.h). Make it once.

    Args:
        pools: `[pages, page_size, kv_heads, dim]` each, any strides with the last 1.
    """
    rows = []
    for pool in pools:
        size = pool.element_size()
        fields = [pool.data_ptr(), *(stride * size for stride in pool.stride()[:3]), pool.shape[3] * size]
        unit = next(u for u in (16, 8, 4, 2, 1) if not any(value % u for value in fields))
        rows.append([*fields, pool.shape[2], unit, 0])
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 8).to(pools[0].device if pools else "cpu")


def page_copy_table(table: Tensor, pairs: Tensor) -> None:
    call("ttsk_cuda_page_copy", table.device, table, len(table), pairs, len(pairs))


def page_copy(k_pool: Tensor, v_pool: Tensor, pairs: Tensor) -> None:
    page_copy_table(pool_table([*k_pool, *v_pool]), pairs)
