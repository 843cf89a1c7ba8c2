"""Tile sizes of tree_attention: the largest that compile without spills (tests/gpu_compile). No GPU has timed them yet."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """Rows of the large tile, tokens of a K, V tile, warps, stages of the load pipeline, and rows of the tile for leaves
    (no second one if it is as large: that saves registers)."""

    large_m: int
    block_n: int
    warps: int
    stages: int
    small_m: int = 16


# By architecture, padded head size and bytes of a KV element. wgmma (sm_90) needs 64 rows to four warps.
TABLE = {
    ("sm_80", 64, 2): Tiles(32, 64, 8, 3), ("sm_80", 64, 1): Tiles(32, 64, 8, 3),
    ("sm_80", 128, 2): Tiles(32, 64, 8, 3), ("sm_80", 128, 1): Tiles(32, 64, 8, 3),
    ("sm_80", 256, 2): Tiles(32, 64, 8, 2), ("sm_80", 256, 1): Tiles(16, 64, 8, 2),
    ("sm_90", 64, 2): Tiles(64, 64, 4, 3), ("sm_90", 64, 1): Tiles(64, 64, 4, 3),
    ("sm_90", 128, 2): Tiles(64, 64, 8, 3), ("sm_90", 128, 1): Tiles(64, 64, 8, 3, 64),
    ("sm_90", 256, 2): Tiles(32, 64, 8, 2), ("sm_90", 256, 1): Tiles(16, 64, 8, 3),
    ("sm_100", 64, 2): Tiles(64, 64, 4, 3), ("sm_100", 64, 1): Tiles(64, 64, 4, 3),
    ("sm_100", 128, 2): Tiles(64, 64, 8, 3), ("sm_100", 128, 1): Tiles(64, 64, 8, 3),
    ("sm_100", 256, 2): Tiles(32, 64, 8, 3), ("sm_100", 256, 1): Tiles(16, 64, 8, 3),
    ("gfx942", 64, 2): Tiles(64, 64, 4, 2), ("gfx942", 64, 1): Tiles(64, 64, 4, 2),
    ("gfx942", 128, 2): Tiles(64, 64, 4, 2), ("gfx942", 128, 1): Tiles(64, 64, 4, 2),
    ("gfx942", 256, 2): Tiles(16, 64, 4, 1), ("gfx942", 256, 1): Tiles(16, 64, 4, 1),
}  # fmt: skip

# The same for kernels that read boxes of pool rows (TMA), where that compiles without spills; gathering serves the rest.
BOX_TABLE = {
    ("sm_90", 64, 2): Tiles(64, 64, 4, 3, 64), ("sm_90", 64, 1): Tiles(64, 64, 8, 3, 64),
    ("sm_90", 128, 2): Tiles(64, 64, 4, 3, 64),
    ("sm_90", 256, 2): Tiles(32, 64, 8, 2, 32), ("sm_90", 256, 1): Tiles(32, 64, 8, 2, 32),
    ("sm_100", 128, 2): Tiles(64, 64, 8, 3, 64),
}  # fmt: skip


def lookup(arch: str, head_dim: int, v_dim: int, kv_bytes: int) -> Tiles:
    if kv_bytes == 4:  # float32 is for checks, not for speed
        return Tiles(16, 64, 8, 1 if arch == "gfx942" else 3)
    width = next(w for w in (64, 128, 256) if w >= max(head_dim, v_dim))
    return TABLE[arch, width, kv_bytes]


def choose_tiles(q: Tensor, k_pages: Tensor, v_pages: Tensor) -> Tiles:
    return lookup(architecture(q.device), q.shape[2], v_pages.shape[3], k_pages.element_size())


def architecture(device: torch.device) -> str:
    """The row of the table that serves a device."""
    if device.type != "cuda":
        return "sm_90"  # the interpreter
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return "sm_80" if major < 9 else "sm_90" if major == 9 else "sm_100"


def default_queues(device: torch.device, kv_heads: int) -> int:
    """Queues (each of kv_heads programs) for a plan with one shared list: two programs a multiprocessor."""
    if device.type != "cuda":
        return 3
    programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, programs // kv_heads)
