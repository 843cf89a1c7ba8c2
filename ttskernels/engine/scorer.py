"""Extend and score: only new verifier tokens are computed, on a forest of the verifier's own; scores come back as floats."""

from __future__ import annotations

import time

import torch

from ttskernels.engine.residency import Residency, missing, uncached_rows
from ttskernels.engine.work import ScoreJob, Session
from ttskernels.errors import OutOfPagesError
from ttskernels.kv.forest import Forest, Node
from ttskernels.kv.plan import build_plan
from ttskernels.ops.step_score import step_score

BATCH_ROWS = 2048  # query rows of one forward


class ScoreRunner:
    """Holds the verifier, its forest and pool, and the jobs that wait."""

    def __init__(self, model, forest: Forest, residency: Residency):
        if model.head is None:
            raise ValueError(
                "verifier has no score head (a plain language model?); load a process reward model, or pass load_model a "
                "HeadSpec that names rows of the language-model head"
            )
        self.model, self.forest, self.residency = model, forest, residency
        self.heads = model.config.heads
        self.jobs: list[ScoreJob] = []

    @property
    def waiting_rows(self) -> int:
        return sum(len(job.ids) for job in self.jobs)

    def drop(self, session: Session) -> None:
        """Cancel a session's waiting jobs."""
        for job in [j for j in self.jobs if j.session is session]:
            job.result.cancel()
            self.jobs.remove(job)

    def step(self) -> bool:
        """Score one batch of jobs, oldest problem first. False: nothing waits, or nothing fits now."""
        self.jobs = [job for job in self.jobs if not job.result.cancelled()]
        jobs, pinned, rows = [], set(), 0
        for job in sorted(self.jobs, key=lambda j: j.session.order):
            if rows and rows + len(job.ids) > BATCH_ROWS:
                break
            if not self._admit(job, pinned):
                continue
            rows += len(job.ids)
            jobs.append(job)
        if not jobs:
            return False
        for job in jobs:
            self.jobs.remove(job)
            if not job.result.set_running_or_notify_cancel():  # from here on a caller can no longer cancel it
                self._give_up(job)
        jobs = [job for job in jobs if job.node is not None]
        if not jobs:
            return True
        try:
            scores = self._run(jobs)
        except Exception as error:  # a bad checkpoint or bad ids: the callers of these jobs hear of it, others go on
            for job in jobs:
                self._give_up(job)
                job.result.set_exception(error)
            return True
        for job, score in zip(jobs, scores, strict=True):
            job.result.set_result((job.node, score))
        return True

    def fail_first(self) -> None:
        """Nothing else is running and the oldest job does not fit: tell its caller."""
        job = min(self.jobs, key=lambda j: j.session.order)
        self.jobs.remove(job)
        if job.result.set_running_or_notify_cancel():
            job.result.set_exception(
                OutOfPagesError("one score job alone does not fit into the KV budget; raise kv_bytes")
            )

    def _admit(self, job: ScoreJob, pinned: set[Node]) -> bool:
        if job.node is None:
            job.node = self.forest.add(job.parent, job.ids)
        path = self.forest.path(job.node)
        if not self.residency.reserve(self.forest, missing(path), pinned.union(path), job.session):
            self._give_up(job)
            return False
        job.session.verifier_nodes.add(job.node)
        pinned.update(path)
        return True

    def _give_up(self, job: ScoreJob) -> None:
        self.forest.release(job.node)
        job.node = None

    def _run(self, jobs: list[ScoreJob]) -> list[list[float]]:
        started = time.perf_counter()
        sources = [job.node for job in jobs]
        reused = {job.node: sum(n.cached for n in self.forest.path(job.node)) for job in jobs}
        hidden: dict[Node, torch.Tensor] = {}
        while len(hidden) < len(jobs):  # a prefix longer than a batch takes several forwards
            self._forward(jobs, [s for s in sources if s not in hidden], hidden)
        head = self.model.head
        scores = step_score(
            torch.cat([hidden[job.node] for job in jobs]),
            torch.arange(sum(len(job.reads) for job in jobs), dtype=torch.int32),
            head.weight, bias=head.bias, inner_weight=head.inner_weight, inner_bias=head.inner_bias,
            norm_weight=self.model.norm, eps=self.model.config.rms_eps, squash=head.squash, mix=head.mix,
        ).tolist()  # fmt: skip
        seconds = (time.perf_counter() - started) / len(jobs)
        result, at = [], 0
        for job in jobs:
            job.session.counters.score_seconds += seconds
            job.session.counters.verifier_reused += reused[job.node]
            result.append(scores[at : at + len(job.reads)])
            at += len(job.reads)
        return result

    def _forward(self, jobs: list[ScoreJob], sources: list[Node], hidden: dict[Node, torch.Tensor]) -> None:
        rows, last_row = uncached_rows(self.forest, sources, BATCH_ROWS, whole=True)
        start = {}
        count = 0
        for node, first, n in rows:
            start[node] = count - first
            count += n
        ready = [job for job in jobs if job.node in start]
        reads = [start[job.node] + read for job in ready for read in job.reads]
        ids = torch.tensor([t for node, first, n in rows for t in node.ids[first : first + n]], dtype=torch.int32)
        plan = build_plan(self.forest, rows, self.heads)
        out = self.model.forward(ids, plan, self.forest.pool, torch.tensor(reads, dtype=torch.int32), output="hidden")
        for node, first, n in rows:
            counters = node.owner.counters
            new = max(0, first + n - max(node.seen, first))
            counters.verifier_prefilled += new
            counters.verifier_recomputed += n - new
            counters.verifier_flops += n * self.model.flops_per_token(node.pos0 + first + (n + 1) / 2)
            node.cached = max(node.cached, first + n)
            node.seen = max(node.seen, node.cached)
        at = 0
        for job in ready:
            hidden[job.node] = out[at : at + len(job.reads)]
            at += len(job.reads)
