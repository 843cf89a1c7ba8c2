"""Decode iterations of whole models with random weights: ours as the engine runs them, and transformers' two ways.

A tree of one prompt and N branches in bf16. `call_us` is wall clock for a token of every branch inside calls of 16 iterations
(what the engine does between two looks at new work), upload and reports included; `graph` is the captured iteration alone on
the device; `plan_us` is the plan that each new tree costs the host. The roofline is that of `python -m ttskernels model` with
this run's copy bandwidth; "with launches" counts what these take in a graph as well. "fp8 KV" keeps K and V in float8, "own
products" takes ours in place of cuBLAS (TTSK_GPU_LINEAR_ROWS), "by kernel" says where an iteration's time goes, and "scattered
pages" has leaves that grew a few tokens at a time, all in turn. Rivals decode N copies of the prompt (a cache of their own
each): transformers' `generate`, compiled, with a static cache, and continuous batching, which shares whole pages of the prompt.
Each case is a row of its own; rivals come last.
"""

from __future__ import annotations

import functools
import gc
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from gpu_measure import DEVICE, DTYPE, GPU, attempt, copy_bandwidth, random_config

from ttskernels.kv import Forest
from ttskernels.kv.machines import H100
from ttskernels.kv.plan import Plan, build_plan
from ttskernels.kv.plan_layout import PAGE_BREAKS
from ttskernels.models.loading import Checkpoint, expected_shapes
from ttskernels.models.model import Model, make_decoder
from ttskernels.roofline import SHAPES, Shape, expect

TINY = Shape("tiny", 1, 2, 1, 32, 64, 96, 131)
NAMES = ["qwen2.5-0.5b", "qwen2.5-1.5b", "llama-3.2-1b", "llama-3.2-3b"]
SWITCH, OWN_ROWS = "TTSK_GPU_LINEAR_ROWS", 128
ITERATIONS, CALLS, RIVAL_TOKENS = (16, 12, 64) if GPU else (2, 1, 3)


def cases(tiny: bool) -> dict[str, Callable[[], dict]]:
    """What `Rows.run` takes. (shape, branches, prompt, tokens of each branch)"""
    shapes = [TINY] if tiny else [SHAPES[name] for name in NAMES]
    sizes = [(3, 32, 5)] if tiny else [(16, 1024, 256), (64, 1024, 256), (256, 1024, 256)]
    made = {}
    kinds = {
        "ours": ours, "ours, fp8 KV": fp8_kv, "ours, own products": own_products, "ours, scattered pages": scattered,
        "by kernel": by_kernel, "own products by kernel": own_by_kernel,
        "transformers generate": generate, "transformers continuous batching": continuous,
    }  # fmt: skip
    for label, case in kinds.items():
        for shape, (n, prompt, suffix) in itertools.product(shapes, sizes):
            if case in (own_products, by_kernel, own_by_kernel) and n > OWN_ROWS:
                continue
            if case in (fp8_kv, by_kernel, own_by_kernel) and n == 16:
                continue
            if case is scattered and n in (16, 256):
                continue
            made[f"{shape.name}; {n} branches of {prompt} + {suffix}; {label}"] = (
                lambda c=case, a=(shape, n, prompt, suffix): c(*a)
            )
    return made


def ours(shape: Shape, n: int, prompt: int, suffix: int, in_turn: int = 0, kv: str = "float") -> dict:
    model = random_model(shape, kv)
    forest, leaves = grown(model, n, prompt, suffix, in_turn)
    rows = [(leaf, len(leaf.ids) - 1, 1) for leaf in leaves]
    wall, planning = [], []
    if GPU:
        torch.cuda.reset_peak_memory_stats()  # what loading took is not asked
    decode(model, forest, build_plan(forest, rows, model.heads, machine=model.machine))  # compiles and captures
    with iteration_events(model) as events:
        for _ in range(CALLS):
            started = time.perf_counter()
            plan = build_plan(forest, rows, model.heads, machine=model.machine)
            planning.append(time.perf_counter() - started)
            wall.append(decode(model, forest, plan))
    breaks = plan.header[PAGE_BREAKS]  # 0: tokens are read as boxes of rows, else gathered
    if not GPU:
        return {"call_us": "ran", "page_breaks": breaks}
    peak = torch.cuda.max_memory_allocated() / 1e9
    floor = expect(shape, [(1, prompt), (n, suffix)], int(model.heads.kv_bytes), replace(H100, bytes_per_second=bandwidth()))
    graph = spread([a.elapsed_time(b) for a, b in events], 1e3)
    percent, launched = (100 * us / graph["median_us"] for us in (floor.iteration_us, floor.launched_iteration_us))
    return {
        "call_us": spread(wall, 1e6), "graph_us": graph, "plan_us": spread(planning, 1e6),
        "tokens_per_second": n / statistics.median(wall), "roofline_us": floor.iteration_us,
        "percent_of_roofline": percent, "percent_with_launches": launched, "kv_gb": floor.kv_bytes / 1e9,
        "peak_gb": peak, "page_breaks": breaks,
    } | judge(n, percent)  # fmt: skip


def judge(branches: int, percent_of_roofline: float) -> dict:
    """The goal is 70 % of the roofline, at 64 branches."""
    return {"goal_met": percent_of_roofline >= 70} if branches == 64 else {}


def scattered(*sizes) -> dict:
    return ours(*sizes, in_turn=8)


def fp8_kv(*sizes) -> dict:
    return ours(*sizes, kv="fp8")


@contextmanager
def own_linears() -> Iterator[None]:
    """Models loaded inside multiply by our kernels."""
    former = os.environ.get(SWITCH)
    os.environ[SWITCH] = str(OWN_ROWS)
    try:
        yield
    finally:
        del os.environ[SWITCH]
        os.environ.update({} if former is None else {SWITCH: former})


def own_products(*sizes) -> dict:
    with own_linears():
        return ours(*sizes)


def by_kernel(shape: Shape, n: int, prompt: int, suffix: int) -> dict:
    """Microseconds of an iteration in each kernel, alone on the device: launches that overlap are counted twice."""
    from torch.profiler import ProfilerActivity, profile

    model = random_model(shape)
    forest, leaves = grown(model, n, prompt, suffix)
    plans = [build_plan(forest, [(leaf, len(leaf.ids) - 1, 1) for leaf in leaves], model.heads, machine=model.machine)
             for _ in range(2)]  # fmt: skip
    decode(model, forest, plans[0])  # compiles and captures
    if not GPU:
        return {"kernels": "ran"}
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        decode(model, forest, plans[1])
        torch.cuda.synchronize()
    spent = sorted(seen.key_averages(), key=lambda event: -event.self_device_time_total)
    per = [(event.key[:48], event.self_device_time_total / ITERATIONS, event.count / ITERATIONS) for event in spent[:14]]
    return {"kernels": "; ".join(f"{name} {us:.0f} ({count:.0f} x)" for name, us, count in per)}


def own_by_kernel(*sizes) -> dict:
    with own_linears():
        return by_kernel(*sizes)


@functools.cache
def bandwidth() -> float:
    return copy_bandwidth()


def decode(model: Model, forest: Forest, plan: Plan) -> float:
    """Seconds of an iteration, in one call of ITERATIONS."""
    rows, vocab = plan.num_rows, model.config.vocab
    tokens, states = torch.zeros(ITERATIONS, rows, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
    params, chances = torch.tensor([[0.7, 0, 1, 0]] * rows), torch.zeros(ITERATIONS, rows)
    args = (torch.arange(rows), params, next_state(vocab), states, tokens, chances)
    started = time.perf_counter()
    done = model.decode(states.clone(), plan, forest.pool, *args)
    seconds = time.perf_counter() - started
    if done != ITERATIONS or not bool(((tokens >= 0) & (tokens < vocab)).all()):
        raise RuntimeError(f"decoded {done} of {ITERATIONS} iterations, tokens {tokens.min()} .. {tokens.max()}")
    return seconds / ITERATIONS


_TABLES: dict[int, torch.Tensor] = {}


def next_state(vocab: int) -> torch.Tensor:
    """One automaton for a run, as an engine has: no token ends a step."""
    return _TABLES.setdefault(vocab, torch.zeros(1, vocab, dtype=torch.int32))


@contextmanager
def iteration_events(model: Model) -> Iterator[list]:
    """Pairs of events around every captured iteration that has no upload in front."""
    queue, events = model.queue, []
    run = queue.run

    def timed(key, work, upload, idle):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2)) if GPU else (None, None)
        if GPU:
            start.record(queue.stream)
        result = run(key, work, upload, idle)
        if GPU:
            end.record(queue.stream)
            events.append((start, end))
        return result

    queue.run = timed
    yield events
    queue.run = run
    if GPU:
        torch.cuda.synchronize()
    events[:] = [pair for i, pair in enumerate(events) if i % ITERATIONS]


def grown(model: Model, n: int, prompt: int, suffix: int, in_turn: int = 0):
    """A forest of a prompt and `n` branches with random K and V, room for ITERATIONS more tokens, and its leaves. A leaf's
    pages follow each other, or, with `in_turn`, come with so many tokens at a time, one leaf's beside the next one's."""
    pages = -(-prompt // 16) + n * -(-(suffix + ITERATIONS) // 16)
    forest = Forest(model.new_pool(pages))
    for layer in (*forest.pool.k, *forest.pool.v):
        layer.copy_(torch.randn(layer.shape, device=layer.device, dtype=DTYPE))
    root = forest.add(None, [7] * prompt)
    forest.reserve([root], 0)
    forest.mark_cached([root])
    leaves = forest.fork(root, n)
    for tokens in range(in_turn, suffix + ITERATIONS, in_turn) if in_turn else ():
        forest.reserve(leaves, tokens)
    forest.reserve(leaves, suffix + ITERATIONS)
    for leaf in leaves:
        forest.append(leaf, [7] * (suffix - 1))
    forest.mark_cached(leaves)
    for leaf in leaves:
        forest.append(leaf, [7])
    return forest, leaves


def random_model(shape: Shape, kv: str = "float") -> Model:
    """A policy of this shape with random weights, on the device."""
    clear()
    config = replace(random_config(shape, tied=True), kv_form=kv)
    weights = {
        name: torch.ones(size, device=DEVICE, dtype=DTYPE) if len(size) == 1
        else torch.randn(size, device=DEVICE, dtype=DTYPE).mul_(size[1] ** -0.5)
        for name, size in expected_shapes(config).items()
    }  # fmt: skip
    checkpoint = Checkpoint(config, weights, None, Path(), True)
    return Model(checkpoint, *make_decoder(checkpoint, "triton", True, DEVICE))


def rival(shape: Shape):
    """A transformers model of this shape with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    clear()
    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.q_heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        vocab_size=shape.vocab, tie_word_embeddings=True, max_position_embeddings=4096, eos_token_id=None,
    )  # fmt: skip
    with torch.device(DEVICE):
        return LlamaForCausalLM(config).to(DTYPE).eval()


def generate(shape: Shape, n: int, prompt: int, suffix: int) -> dict:
    model = rival(shape)
    ids = torch.randint(shape.vocab, (n, prompt + suffix - RIVAL_TOKENS), device=DEVICE)
    stamps: list[float] = []

    def stamp(input_ids, scores, **_):
        if GPU:
            torch.cuda.synchronize()
        stamps.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    options = dict(
        max_new_tokens=RIVAL_TOKENS, do_sample=True, temperature=0.7, top_k=0, pad_token_id=0,
        cache_implementation="static", stopping_criteria=[stamp], disable_compile=not GPU,
    )  # fmt: skip

    def timed() -> dict:
        for _ in range(2):  # the first compiles
            stamps.clear()
            with torch.no_grad():
                model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return tokens_of(stamps)

    return rival_row(timed, n)


def continuous(shape: Shape, n: int, prompt: int, suffix: int) -> dict:
    from transformers import GenerationConfig

    if not GPU:
        return {"call_us": "not on a CPU: it takes nearly all of the memory for its cache"}
    model = rival(shape)
    shared = torch.randint(shape.vocab, (prompt,)).tolist()
    inputs = [shared + torch.randint(shape.vocab, (suffix - RIVAL_TOKENS,)).tolist() for _ in range(n)]
    config = GenerationConfig(
        max_new_tokens=RIVAL_TOKENS, do_sample=True, temperature=0.7, top_k=0, eos_token_id=-1, pad_token_id=0
    )

    def timed() -> dict:
        for _ in range(2):
            out = model.generate_batch(inputs=inputs, generation_config=config, record_timestamps=True)
        if len(out) != n or any(len(each.generated_tokens) != RIVAL_TOKENS for each in out.values()):
            raise RuntimeError(f"{len(out)} of {n} requests came back, or were cut short")
        return tokens_of(max((each.timestamps for each in out.values()), key=lambda t: t[0]))  # the last to start

    return rival_row(timed, n)


def tokens_of(stamps: list[float]) -> dict:
    """Time of a token from when each was there; the first quarter is warming up."""
    steps = [b - a for a, b in itertools.pairwise(stamps)]
    return spread(steps[len(steps) // 4 :], 1e6)


def rival_row(timed: Callable[[], dict], n: int) -> dict:
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    result = attempt(timed)
    if isinstance(result, str) or not GPU:
        return {"call_us": result if isinstance(result, str) else "ran"}
    return {
        "call_us": result, "tokens_per_second": n / result["median_us"] * 1e6,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
    }  # fmt: skip


def spread(values: list[float], scale: float) -> dict:
    ordered = sorted(v * scale for v in values)
    return {
        "median_us": statistics.median(ordered), "p20_us": ordered[len(ordered) // 5], "p80_us": ordered[-len(ordered) // 5]
    }  # fmt: skip


def clear() -> None:
    """Give back what the case before held."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
