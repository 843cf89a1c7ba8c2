"""Tile sizes of tree_attention, by what was measured (sm_90) or compiles without spills (tests/gpu_compile)."""

from typing import NamedTuple

import torch

EARLY_ARCHS = ("sm_90", "sm_100")  # have launches that begin before the one in front has ended, and boxes (TMA)


class Tile(NamedTuple):
    """Rows ((row, query head of a group) pairs), tokens of a K, V tile, warps, stages of the load pipeline, programs of a
    multiprocessor, and the most registers of a thread. Saying 255 keeps ptxas from spilling for the sake of occupancy; 0
    says nothing (AMD). `programs` is never more than fit at once by registers and shared memory (tests/gpu_compile): one
    that had to wait for others to end would begin with a task of its own all the same, as the last of all."""

    rows: int
    tokens: int
    warps: int
    stages: int
    programs: int = 2
    registers: int = 255


class Tiles(NamedTuple):
    """For items of many rows, and for the others."""

    large: Tile
    small: Tile


SMALL, WIDE_SMALL = Tile(16, 64, 4, 3), Tile(16, 32, 8, 3, 1)
AMD, AMD_SMALL, AMD_WIDE = Tile(64, 64, 4, 2, 1, 0), Tile(16, 64, 4, 1, 2, 0), Tile(16, 64, 4, 1, 1, 0)
# By architecture, padded head size and bytes of a KV element. wgmma (sm_90) needs 64 rows to four warps.
TABLE = {
    ("sm_80", 64, 2): Tiles(Tile(32, 64, 8, 3, 1), SMALL), ("sm_80", 64, 1): Tiles(Tile(32, 64, 8, 3, 1), SMALL),
    ("sm_80", 128, 2): Tiles(Tile(32, 64, 8, 3, 1), SMALL), ("sm_80", 128, 1): Tiles(Tile(32, 64, 8, 3, 1), SMALL),
    ("sm_80", 256, 2): Tiles(Tile(32, 64, 8, 2, 1), WIDE_SMALL), ("sm_80", 256, 1): Tiles(Tile(16, 64, 8, 2, 1), WIDE_SMALL),
    ("sm_90", 64, 2): Tiles(Tile(64, 64, 4, 3), SMALL), ("sm_90", 64, 1): Tiles(Tile(64, 64, 4, 3), SMALL),
    ("sm_90", 128, 2): Tiles(Tile(64, 64, 4, 3), SMALL), ("sm_90", 128, 1): Tiles(Tile(64, 64, 8, 3, 1), SMALL),
    ("sm_90", 256, 2): Tiles(Tile(32, 64, 8, 2, 1), WIDE_SMALL), ("sm_90", 256, 1): Tiles(Tile(16, 64, 8, 3, 1), WIDE_SMALL),
    ("sm_100", 64, 2): Tiles(Tile(64, 64, 4, 3), SMALL), ("sm_100", 64, 1): Tiles(Tile(64, 64, 4, 3), SMALL),
    ("sm_100", 128, 2): Tiles(Tile(64, 64, 8, 3, 1), SMALL), ("sm_100", 128, 1): Tiles(Tile(64, 64, 8, 3, 1), SMALL),
    ("sm_100", 256, 2): Tiles(Tile(32, 64, 8, 3, 1), WIDE_SMALL), ("sm_100", 256, 1): Tiles(Tile(16, 64, 8, 3, 1), WIDE_SMALL),
    ("gfx942", 64, 2): Tiles(AMD, AMD_SMALL), ("gfx942", 64, 1): Tiles(AMD, AMD_SMALL),
    ("gfx942", 128, 2): Tiles(AMD, AMD_SMALL), ("gfx942", 128, 1): Tiles(AMD, AMD_WIDE),
    ("gfx942", 256, 2): Tiles(AMD_WIDE, AMD_WIDE), ("gfx942", 256, 1): Tiles(AMD_WIDE, AMD_WIDE),
}  # fmt: skip

# The same for kernels that read boxes of pool rows (TMA), where that compiles; gathering serves the rest. On an H200 two
# warps and short tiles, four programs to a multiprocessor, were fastest for leaves, and large tiles of 128 rows or 128
# tokens slower than these (bench/LOG.md).
BOX_SMALL = Tile(16, 32, 2, 3, 4)
BOX_TABLE = {
    ("sm_90", 64, 2): Tiles(Tile(64, 64, 4, 3), BOX_SMALL), ("sm_90", 64, 1): Tiles(Tile(64, 64, 8, 3, 1), SMALL),
    ("sm_90", 128, 2): Tiles(Tile(64, 64, 4, 3), BOX_SMALL),
    ("sm_90", 256, 2): Tiles(Tile(32, 64, 8, 2, 1), WIDE_SMALL),
    ("sm_90", 256, 1): Tiles(Tile(32, 64, 8, 2, 1), WIDE_SMALL),
    ("sm_100", 128, 2): Tiles(Tile(64, 64, 8, 3, 1), SMALL),
}  # fmt: skip


def lookup(arch: str, head_dim: int, v_dim: int, kv_bytes: int) -> Tiles:
    width = next(w for w in (64, 128, 256) if w >= max(head_dim, v_dim))
    if kv_bytes == 4:  # float32 is for checks, not for speed; sm_89 has the least shared memory
        tokens, stages = (64, 3) if width <= 128 else (32, 2)
        tile = Tile(16, tokens, 8, 1, 1, 0) if arch == "gfx942" else Tile(16, tokens, 8, stages, 1)
        return Tiles(tile, tile)
    return TABLE[arch, width, kv_bytes]


def architecture(device: torch.device) -> str:
    """The row of the table that serves a device."""
    if device.type != "cuda":
        return "sm_90"  # the interpreter
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return "sm_80" if major < 9 else "sm_90" if major == 9 else "sm_100"


def programs(device: torch.device, tile: Tile, kv_heads: int) -> int:
    """Programs of a launch, a multiple of `kv_heads`."""
    if device.type != "cuda":
        return 3 * kv_heads
    most = tile.programs * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, most // kv_heads) * kv_heads


def begins_early(tensor: torch.Tensor) -> bool:
    """Whether launches on a tensor's device may begin before the one in front has ended."""
    return tensor.is_cuda and architecture(tensor.device) in EARLY_ARCHS


def options(tile: Tile | None, early: bool) -> dict:
    """Compile options of a launch; `early`: it may begin before the one in front has ended."""
    return ({"launch_pdl": True} if early else {}) | ({"maxnreg": tile.registers} if tile and tile.registers else {})


def all_registers(device: torch.device) -> dict:
    """Compile option of a kernel that is to have a multiprocessor to itself: no spilling for the sake of occupancy."""
    return {"maxnreg": 255} if device.type == "cuda" and not torch.version.hip else {}
