"""Tile sizes of tree_attention. No GPU has measured them yet: they are those that compile within budget."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """Rows of the large tile (leaves use 16), tokens of a K, V tile, warps, and stages of the load pipeline."""

    large_m: int
    block_n: int
    warps: int
    stages: int


def default_tiles(q: Tensor, k_pages: Tensor, v_pages: Tensor) -> Tiles:
    return Tiles(64, 64, 4, 3)


def default_queues(device: torch.device, kv_heads: int) -> int:
    """Queues (each of kv_heads programs) for a plan with one shared list: two programs a multiprocessor."""
    if device.type != "cuda":
        return 3
    programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, programs // kv_heads)
