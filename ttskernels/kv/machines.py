"""Planner constants of GPUs. Calculated from data sheets and published kernels: nothing here was measured yet."""

from __future__ import annotations

from dataclasses import dataclass

from ttskernels.kv.plan_layout import HeadShape, Machine


@dataclass(frozen=True)
class Device:
    """What a GPU can reach: memory bandwidth, dense bf16 rate of a Triton kernel, and the cost of one more launch."""

    name: str
    processors: int
    bytes_per_second: float
    flops_per_second: float
    launch_us: float  # inside a CUDA graph
    memory_bytes: int


H100 = Device("H100", 132, 3.0e12, 600e12, 1.25, 80 << 30)
H200 = Device("H200", 132, 4.3e12, 600e12, 1.25, 141 << 30)
A100 = Device("A100", 108, 1.7e12, 250e12, 1.5, 80 << 30)
DEVICES = {d.name.lower(): d for d in (H100, H200, A100)}


def gpu_machine(heads: HeadShape, device: Device = H100, block_rows: int = 64) -> Machine:
    """A queue is one program for each kv head; two programs share a multiprocessor.

    `block_rows`: rows of the kernel's large tile (`Tiles.large_m`).
    """
    queues = max(1, 2 * device.processors // heads.kv_heads)
    return Machine(
        workers=queues,
        queues=queues,
        flops_per_second=device.flops_per_second,
        bytes_per_second=device.bytes_per_second,
        partial_bytes_per_second=2 * device.bytes_per_second,  # mostly in the second-level cache
        item_us=1.0,
        tile_rows=16,
        block_rows=block_rows,
        tasks_per_worker=2 * heads.kv_heads,  # about two items a queue
        min_piece_us=2.0,
    )
