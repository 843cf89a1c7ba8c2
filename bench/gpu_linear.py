"""Products of a decode iteration: the vendor's against ours, with the built-in tile and with the fastest of many.

A case is one matrix of a model and a number of rows. `vendor` is cuBLAS, with the activation behind it where ours is gated;
`own` sums nothing up: its parts are read by the launch behind it. The floor is the weight's bytes over this run's copy
bandwidth. What to write into `choose_tile` (_triton/linear.py), and from how many rows on the vendor wins.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from gpu_measure import DEVICE, DTYPE, GPU, copies_for, copy_bandwidth, measure

from ttskernels._triton.linear import SHARED_BYTES, LinearTile, choose_tile
from ttskernels._triton.linear import linear as launch
from ttskernels.ops.silu_mul import silu_mul
from ttskernels.roofline import SHAPES, Shape

NAMES, ROWS = ["qwen2.5-1.5b", "qwen2.5-0.5b", "llama-3.2-1b", "llama-3.2-3b"], (64, 16, 128)
TINY = Shape("tiny", 1, 2, 1, 32, 64, 96, 131)


def matrices(shape: Shape) -> dict[str, tuple[int, int, bool]]:
    """Name -> (outputs, inputs, gated)."""
    queries = shape.q_heads * shape.head_dim
    return {
        "q, k and v": (queries + 2 * shape.kv_heads * shape.head_dim, shape.hidden, False), "o": (shape.hidden, queries, False),
        "gate and up": (shape.intermediate, shape.hidden, True), "down": (shape.hidden, shape.intermediate, False),
    }  # fmt: skip


def cases(tiny: bool) -> dict[str, Callable[[], dict]]:
    shapes = [TINY] if tiny else [SHAPES[name] for name in NAMES]
    return {
        f"{shape.name} {name}, {rows} rows": lambda a=(rows, *size): case(*a)
        for rows, shape in itertools.product((3,) if tiny else ROWS, shapes) for name, size in matrices(shape).items()
    }  # fmt: skip


def tiles(rows: int, outputs: int, inputs: int, gated: bool) -> list[LinearTile]:
    """The built-in tile first."""
    size = DTYPE.itemsize
    processors = torch.cuda.get_device_properties(DEVICE).multi_processor_count if GPU else 2
    first = choose_tile(rows, outputs, inputs, size, gated, processors)
    made = [first, *(first._replace(ahead=ahead) for ahead in (0, 128, 2048))]
    for block_n, block_k, shared in itertools.product((64, 128), (64, 128), (SHARED_BYTES, 2 * SHARED_BYTES)):
        stages = min(8, shared // ((first.rows + block_n * (1 + gated)) * block_k * size))
        blocks = -(-outputs // block_n)
        parts = {1} if gated else {min(16, -(-inputs // block_k), max(1, round(n * processors / blocks))) for n in (1, 2, 4)}
        made += [first._replace(outputs=block_n, inputs=block_k, stages=stages, parts=p) for p in sorted(parts) if stages > 1]
    return list(dict.fromkeys(made if GPU else made[:2]))


def case(rows: int, outputs: int, inputs: int, gated: bool) -> dict:
    height = outputs * (1 + gated)
    nbytes = height * inputs * DTYPE.itemsize
    copies = copies_for(nbytes)
    x = torch.randn(rows, inputs, device=DEVICE, dtype=DTYPE)
    weights = torch.randn(copies, height, inputs, device=DEVICE, dtype=DTYPE).mul_(inputs**-0.5)

    def vendor(i: int) -> torch.Tensor:
        y = torch.nn.functional.linear(x, weights[i])
        return silu_mul(y[:, :outputs], y[:, outputs:], impl="triton") if gated else y

    expected, tried = exact(x, weights[0], gated), {}
    limit = 2 * (vendor(0).float() - expected).abs().max().item()
    for tile in tiles(rows, outputs, inputs, gated):
        error = (launch(x, weights[0], gated, tile=tile).float().sum(0) - expected).abs().max().item()
        if not error <= limit:
            raise RuntimeError(f"{tile} differs from a float32 product by {error:.3g}, twice the vendor by {limit:.3g}")
        times = measure(lambda i, tile=tile: launch(x, weights[i], gated, tile=tile), copies)
        tried[tile] = times["cold"]["median_us"] if times else float(len(tried))
    best, row = min(tried, key=tried.get), {"vendor": measure(vendor, copies), "own_us": next(iter(tried.values()))}
    floor = nbytes / bandwidth() * 1e6
    return row | {"best_us": tried[best], "best": str(tuple(best)), "tried": len(tried), "floor_us": floor}


def exact(x: torch.Tensor, weight: torch.Tensor, gated: bool) -> torch.Tensor:
    """The product, and the activation behind it, in float32."""
    y = torch.nn.functional.linear(x.float(), weight.float())
    if not gated:
        return y
    gate, up = y.chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


@functools.cache
def bandwidth() -> float:
    return copy_bandwidth()
