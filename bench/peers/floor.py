"""The least time a job can take here: its arithmetic over the measured peak, or its bytes over the measured read rate.

A job is a row of forwards (a prefill, then decode iterations). Each forward has a dense part (weights, read once) and attention
(every node of the tree read once for all rows below it); each part takes max(flops / peak, bytes / rate), and parts add up.
Sampling, norms and everything in Python count as nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from workloads import Workload


@dataclass(frozen=True)
class Shape:
    hidden: int
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int

    @classmethod
    def read(cls, folder: Path) -> Shape:
        c = json.loads((folder / "config.json").read_text())
        dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
        return cls(
            c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"], c["num_key_value_heads"], dim,
            c["intermediate_size"], c["vocab_size"],
        )  # fmt: skip

    @property
    def layer_weights(self) -> int:
        return self.hidden * self.head_dim * 2 * (self.q_heads + self.kv_heads) + 3 * self.hidden * self.intermediate


@dataclass(frozen=True)
class Rates:
    """Of all threads: GFLOP/s of dense products, GFLOP/s of attention, GB/s."""

    dense_gflops: float
    attention_gflops: float
    read_gbps: float
    weight_bytes: int = 2
    kv_bytes: int = 2


def forward_seconds(shape: Shape, rates: Rates, rows: int, logit_rows: int, flops_tokens: float, kv_tokens: float) -> float:
    """One forward of `rows` tokens. `flops_tokens`: (row, visible token) pairs; `kv_tokens`: distinct tokens that are read."""

    def part(gflops: float, flops: float, moved: float) -> float:
        return max(flops / gflops, moved / rates.read_gbps) / 1e9

    weights = shape.layers * shape.layer_weights
    head = shape.hidden * shape.vocab if logit_rows else 0
    flops = 2.0 * (rows * weights + logit_rows * shape.hidden * shape.vocab)
    dense = part(rates.dense_gflops, flops, rates.weight_bytes * (weights + head))
    flops = 4.0 * shape.layers * shape.q_heads * shape.head_dim * flops_tokens
    moved = 2.0 * shape.layers * shape.kv_heads * shape.head_dim * rates.kv_bytes * kv_tokens
    return dense + part(rates.attention_gflops, flops, moved)


def prefill_seconds(shape: Shape, rates: Rates, tokens: int, behind: int = 0, rows: int = 1, logit_rows: int = 1) -> float:
    """`rows` chains of `tokens` new tokens behind `behind` shared ones."""
    pairs = rows * tokens * (behind + (tokens + 1) / 2)
    return forward_seconds(shape, rates, rows * tokens, logit_rows, pairs, behind + rows * tokens)


def job_seconds(workload: Workload, shape: Shape, rates: Rates, scored: bool = True) -> float:
    """The floor of a workload. In a search, survivors are taken to share all they can: the fewest bytes a tree may have."""
    paths, tokens = workload.samples, workload.tokens
    total = prefill_seconds(shape, rates, workload.prompt)
    for step in range(workload.steps):
        depth = workload.prompt + step * tokens
        if step:  # the survivors' last tokens give their children's first ones; at first the prompt's own forward does
            total += forward_seconds(shape, rates, paths // workload.width, paths // workload.width, paths * depth, depth)
        for done in range(1, tokens):
            total += forward_seconds(shape, rates, paths, paths, paths * (depth + done), depth + paths * done)
        if workload.kind != "samples" and scored:
            total += prefill_seconds(shape, rates, tokens, depth, paths, 0)
    if workload.kind != "samples" and scored:
        total += prefill_seconds(shape, rates, workload.prompt, logit_rows=0)
    return total


def kv_tokens(workload: Workload, page: int = 16) -> int:
    """Slots that the forest takes for samples of one prompt: pages of the prompt once, and of every sample."""
    pages = -(-workload.prompt // page) + workload.samples * -(-workload.tokens // page)
    return page * pages
