"""Planner constants of GPUs: copy bandwidths measured on an H200, cost of an item and number of tasks tried out there
(bench/LOG.md); the rest from data sheets and published kernels."""

from __future__ import annotations

from dataclasses import dataclass

from ttskernels.kv.plan_layout import HeadShape, Machine


@dataclass(frozen=True)
class Device:
    """What a GPU can reach: memory bandwidth, dense bf16 rate of a Triton kernel, the cost of one more launch, and whether
    a launch may begin before the one in front has ended (attention's own do)."""

    name: str
    processors: int
    bytes_per_second: float
    flops_per_second: float
    launch_us: float  # inside a CUDA graph
    memory_bytes: int
    early_launches: bool = True


H100 = Device("H100", 132, 3.0e12, 600e12, 1.25, 80 << 30)
H200 = Device("H200", 132, 4.3e12, 600e12, 1.25, 141 << 30)
A100 = Device("A100", 108, 1.7e12, 250e12, 1.5, 80 << 30, early_launches=False)
DEVICES = {d.name.lower(): d for d in (H100, H200, A100)}


def gpu_machine(heads: HeadShape, device: Device = H100, block_rows: int = 64) -> Machine:
    """A worker is one program for each kv head, two programs share a multiprocessor, and all draw from one list.

    `block_rows`: rows of the kernel's large tile (`Tiles.large`).
    """
    return Machine(
        workers=max(1, 2 * device.processors // heads.kv_heads),
        queues=1,
        fold=True,
        flops_per_second=device.flops_per_second,
        bytes_per_second=device.bytes_per_second,
        partial_bytes_per_second=2 * device.bytes_per_second,  # mostly in the second-level cache
        item_us=2.0,
        tile_rows=16,
        block_rows=block_rows,
        tasks_per_worker=max(1, 3 * heads.kv_heads // 2),  # of a program: one or two
        min_piece_us=2.0,
    )
