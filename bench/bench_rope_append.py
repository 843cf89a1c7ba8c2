"""Rotation and KV write of one decode iteration: fused against the torch ops that transformers runs.

    pytest bench/bench_rope_append.py --benchmark-columns=median,iqr,rounds

`cpu` computes cos and sin in the call; the C++ decoder computes them once for all layers (RopeTable). `torch`
is apply_rotary_pos_emb with cos and sin given, then an index_put of K and V.
"""

import os

import pytest
import torch

from ttskernels import _dispatch, layout
from ttskernels.ops.rope_append import rope_append

PEAK_GBPS = float(os.environ.get("TTSK_PEAK_GBPS", 21))
# rows, q heads, kv heads, head dim
SHAPES = {"16x28/4x128": (16, 28, 4, 128), "64x14/2x64": (64, 14, 2, 64), "2048x14/2x64": (2048, 14, 2, 64)}


def make(rows, q_heads, kv_heads, dim):
    torch.manual_seed(0)
    q, k, v = (torch.randn(rows, h, dim).bfloat16() for h in (q_heads, kv_heads, kv_heads))
    inv_freq = 10000.0 ** -(torch.arange(dim // 2) / (dim // 2))
    pages = rows // 16 + 1
    slots = torch.randperm(pages * 16)[:rows].int()
    return q, k, v, inv_freq, torch.randint(0, 4096, (rows,), dtype=torch.int32), slots, pages


def rotate_half(x):
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


@pytest.mark.parametrize("impl", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("shape", SHAPES)
def test_bench_rope_append(benchmark, shape, impl):
    if impl == "reference" and not shape.startswith("16x"):
        pytest.skip("the reference is timed at the small shape only")
    q, k, v, inv_freq, positions, slots, pages = make(*SHAPES[shape])
    benchmark.group = f"rope_append {shape} bf16"
    k_pages, v_pages = layout.new_pages(pages, k.shape[1], k.shape[2], torch.bfloat16)
    before = torch.get_num_threads()
    torch.set_num_threads(_dispatch.library().ttsk_num_threads())
    if impl == "torch":
        k_cache, v_cache = layout.to_nhd(k_pages, v_pages)
        page, slot = slots.long() // 16, slots.long() % 16
        angles = (positions[:, None].float() * inv_freq).repeat(1, 2)
        cos, sin = angles.cos().bfloat16()[:, None], angles.sin().bfloat16()[:, None]

        def call():
            k_cache[page, slot] = k * cos + rotate_half(k) * sin
            v_cache[page, slot] = v
            return q * cos + rotate_half(q) * sin
    else:

        def call():
            return rope_append(q, k, v, inv_freq, positions, slots, k_pages, v_pages, impl=impl)

    benchmark.pedantic(call, rounds=30, warmup_rounds=3, iterations=3)
    torch.set_num_threads(before)
    moved = 2 * (q.numel() + k.numel() + v.numel()) * 2
    benchmark.extra_info |= {"bytes": moved, "isa": _dispatch.isa_name()}
    if benchmark.stats is not None:
        gbps = moved / benchmark.stats.stats.median / 1e9
        benchmark.extra_info |= {
            "gbps": round(gbps, 2),
            "bandwidth_percent": round(100 * gbps / PEAK_GBPS, 1),
        }
