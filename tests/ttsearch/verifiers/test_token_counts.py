"""PRM tokens of step search at full size, counted by the engine: N paths of K steps of L tokens behind a problem of P.

Scoring every path anew at every step reads N * (K P + L K (K + 1) / 2) tokens, an exact implementation P + N K L.
"""

import asyncio
from types import SimpleNamespace

import pytest
import torch
from tiny_tokenizers import bytes_only
from ttsearch.verifiers import FAMILIES, TextVerifier
from ttsearch.verifiers.session import EngineVerifier

from ttskernels.engine.batcher import Engine
from ttskernels.kv.plan_layout import HeadShape
from ttskernels.kv.pool import PagePool
from ttskernels.models.device_queue import DeviceQueue
from ttskernels.models.heads import ScoreHead


class CountingModel:
    """The shape of a model whose forward gives zeros; everything around it (text, forest, plans, batches) is real."""

    kv_bytes_per_token = 2 * 4 * 4
    machine, reserves_pool = None, False

    def __init__(self):
        heads = HeadShape(1, 1, 4, 4, 4)
        self.config = SimpleNamespace(vocab=256, max_positions=4096, heads=heads, rms_eps=1e-5)
        self.head, self.norm = ScoreHead(torch.ones(1, 8), squash="sigmoid"), torch.ones(8)
        self.queue, self.rows = DeviceQueue(torch.device("cpu")), 0

    def forget_pool(self, pool):
        pass

    def new_pool(self, num_pages, budget=None):
        return PagePool(1, 1, 4, num_pages, torch.float32, budget)

    def flops(self, first, rows=1, output="hidden"):
        return float(rows)

    def forward(self, ids, plan, pool, out_rows, output):
        assert plan.num_rows == len(ids)
        self.rows += len(ids)
        return torch.zeros(len(out_rows), 8)


@pytest.mark.parametrize(
    ("problem", "length", "steps", "paths", "full", "incremental", "ratio"),
    [
        (150, 50, 10, 64, 272_000, 32_150, 8.5),
        (150, 50, 20, 256, 3_456_000, 256_150, 13.5),
        (200, 60, 40, 256, 14_643_200, 614_600, 23.8),
    ],
)
def test_step_search_reads_what_is_new_and_nothing_else(problem, length, steps, paths, full, incremental, ratio):
    model = CountingModel()
    engine = Engine(None, model, kv_bytes=256 << 20)
    verifier = EngineVerifier(engine, TextVerifier(bytes_only(), FAMILIES["trl"], model.config.max_positions), owned=True)

    async def search():
        handles = [session.root] * paths
        for k in range(steps):
            texts = [f"{k} of {i}".ljust(length - 1, ".") for i in range(paths)]  # and a newline behind each
            scored = await asyncio.gather(*(session.score(h, [t]) for h, t in zip(handles, texts, strict=True)))
            if k:
                session.release(handles)
            handles = [s.handle for s in scored]
        return scored

    with verifier:
        session = verifier.open("?" * problem)
        scored = asyncio.run(search())
        cost = session.cost()
    assert all(s.scores == [0.5] and s.running.count == steps for s in scored)
    assert cost.tokens_prefilled == model.rows == incremental and cost.tokens_recomputed == 0
    assert cost.tokens_prefilled + cost.tokens_reused == full
    assert round(full / cost.tokens_prefilled, 1) == ratio
