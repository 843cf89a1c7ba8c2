"""Extend and score: only new verifier tokens are computed, on a forest of the verifier's own; scores come back as floats."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from ttskernels.engine.reading import check_readable, flops_of_read, read_scores
from ttskernels.engine.residency import Residency, missing, uncached_rows
from ttskernels.engine.work import ScoreJob, Session
from ttskernels.errors import OutOfPagesError
from ttskernels.kv.forest import Forest, Node
from ttskernels.kv.plan import build_plan
from ttskernels.models.device_queue import Fetch

BATCH_ROWS = 2048  # query rows of one forward
NOT_FINITE = (
    "the verifier's hidden state or score is not finite at a step's end, so the step has no score; "
    'its weights overflow or are damaged: try dtype="fp32", or download the checkpoint again'
)


@dataclass(eq=False)
class Batch:
    """Jobs whose forwards are under way: on a GPU, beside whatever else runs there."""

    jobs: list[ScoreJob]
    reused: dict[Node, int]  # verifier tokens that a job's chain had already
    scores: Fetch
    started: float


class ScoreRunner:
    """Holds the verifier, its forest and pool, the jobs that wait, and the batches under way."""

    def __init__(self, model, forest: Forest, residency: Residency):
        check_readable(model)
        self.model, self.forest, self.residency = model, forest, residency
        self.heads = model.config.heads
        self.jobs: list[ScoreJob] = []
        self.running: list[Batch] = []

    @property
    def waiting_rows(self) -> int:
        return sum(len(job.ids) for job in self.jobs)

    def submit(self, job: ScoreJob, keep: int | None) -> None:
        """Queue a job behind the first `keep` tokens of its parent's chain (None: all of them)."""
        chain, limit = self.forest.length(job.parent), self.model.config.max_positions
        keep = chain if keep is None else keep
        if not 0 <= keep <= chain:
            raise ValueError(f"keep must be in 0 .. {chain}, the tokens of parent's chain, got {keep}")
        if keep + len(job.ids) > limit:
            raise ValueError(f"path has {keep + len(job.ids)} verifier tokens, the verifier allows {limit}")
        if keep == 0 and job.reads[0] < 0:
            raise ValueError("reads must not begin with -1 where keep is 0: no token is in front of ids")
        job.parent = self.rolled_back(job.parent, keep, job.session) if keep else None
        if job.parent is not None:
            self.forest.retain(job.parent)  # the caller may release its own handle while the job waits
        self.jobs.append(job)

    def drop(self, session: Session) -> None:
        """Cancel a session's waiting jobs, after those that are under way."""
        self.collect(wait=True)
        for job in [j for j in self.jobs if j.session is session]:
            job.result.cancel()
            self._forget(job)

    def step(self) -> bool:
        """Start one batch of jobs, oldest problem first; off a GPU it is done on return. False: nothing waits, or fits now."""
        for job in [job for job in self.jobs if job.result.cancelled()]:
            self._forget(job)
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
            self._forget(job)  # its node holds the parent now
            if not job.result.set_running_or_notify_cancel():  # from here on a caller can no longer cancel it
                self._give_up(job)
        jobs = [job for job in jobs if job.node is not None]
        if not jobs:
            return True
        try:
            with self.model.queue.current(join=False):  # the policy goes on meanwhile
                self.running.append(self._run(jobs))
        except Exception as error:  # a bad checkpoint or bad ids: the callers of these jobs hear of it, others go on
            self._fail(jobs, error)
        self.collect()
        return True

    def collect(self, wait: bool = False) -> None:
        """Give the callers of finished batches their scores; with `wait`, of every batch."""
        while self.running and (wait or self.running[0].scores.ready()):
            batch = self.running.pop(0)
            try:
                scores = batch.scores.wait().tolist()
            except Exception as error:
                self._fail(batch.jobs, error)
            else:
                self._finish(batch, scores)

    def _fail(self, jobs: list[ScoreJob], error: Exception) -> None:
        for job in jobs:
            self._give_up(job)
            job.result.set_exception(error)

    def fail_first(self) -> None:
        """Nothing else is running and the oldest job does not fit: tell its caller."""
        job = min(self.jobs, key=lambda j: j.session.order)
        self._forget(job)
        if job.result.set_running_or_notify_cancel():
            job.result.set_exception(
                OutOfPagesError("one score job alone does not fit into the KV budget; raise kv_bytes")
            )

    def _forget(self, job: ScoreJob) -> None:
        """Take a job out of the queue and give back its handle on the parent."""
        self.jobs.remove(job)
        if job.parent is not None:
            self.forest.release(job.parent)

    def rolled_back(self, node: Node, keep: int, session: Session) -> Node:
        """The node that ends behind token `keep` of the chain of `node`; an ancestor is cut in two if none does.

        What was computed behind the cut is dropped and computed again if somebody still needs it: its attention ran
        over a longer node, and scores are a function of the chain of nodes alone, to the last bit.
        """
        while node.pos0 >= keep:
            node = node.parent
        if node.pos0 + len(node.ids) == keep:
            return node
        self.forest.retain(node)  # an ancestor may live through its children alone
        upper = self.forest.split(node, keep - node.pos0)
        session.verifier_nodes.add(upper)
        nodes = [n for forest, its in self.residency.forests if forest is self.forest for n in its(session)]
        below = [n for n in nodes if not n.released and n.pos0 > node.pos0] if node.children else []
        for stale in [node, *(n for n in below if node in self.forest.path(n))]:
            self.forest.evict(stale)
        self.residency.epoch += 1  # branches may decode below, if the policy's forest is the same
        self.forest.release(node)
        self.forest.release(upper)  # the lower half keeps it, and the caller's handle to come
        return upper

    def _admit(self, job: ScoreJob, pinned: set[Node]) -> bool:
        if job.node is None:
            job.node = self.forest.add(job.parent, job.ids)
            job.node.owner = job.session
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

    def _run(self, jobs: list[ScoreJob]) -> Batch:
        started = time.perf_counter()
        sources = [job.node for job in jobs]
        reused, seen = {}, set()
        for job in jobs:  # what the batch computes is the first job's that needs it
            path = [n for n in self.forest.path(job.node) if n not in seen]
            reused[job.node] = self.forest.length(job.node) - sum(len(n.ids) - n.cached for n in path)
            seen.update(path)
        hidden: dict[Node, torch.Tensor] = {}
        while len(hidden) < len(jobs):  # a prefix longer than a batch takes several forwards
            self._forward(jobs, [s for s in sources if s not in hidden], hidden)
        targets = [target for job in jobs for target in job.targets]
        scores = read_scores(self.model, torch.cat([hidden[job.node] for job in jobs]), targets)
        return Batch(jobs, reused, self.model.queue.fetch(scores), started)

    def _finish(self, batch: Batch, scores: list[float]) -> None:
        """`scores` of all jobs' reads, one after the other, to each its own."""
        seconds, at = (time.perf_counter() - batch.started) / len(batch.jobs), 0
        for job in batch.jobs:
            counters = job.session.counters
            counters.score_seconds += seconds
            counters.verifier_reused += batch.reused[job.node]
            counters.verifier_flops += sum(flops_of_read(self.model, job.node.pos0 + r) for r in job.reads)
            mine = scores[at : at + len(job.reads)]
            at += len(job.reads)
            if all(map(math.isfinite, mine)):
                job.result.set_result((job.node, mine))
            else:
                self._give_up(job)
                job.result.set_exception(ValueError(NOT_FINITE))

    def _forward(self, jobs: list[ScoreJob], sources: list[Node], hidden: dict[Node, torch.Tensor]) -> None:
        rows, last_row = uncached_rows(self.forest, sources, BATCH_ROWS, whole=True)
        start = {}
        count = 0
        for node, first, n in rows:
            start[node] = count - first
            count += n
        ready = [job for job in jobs if job.node in start]
        for above in {job.node.parent: None for job in ready if job.reads and job.reads[0] < 0}:
            if above not in start:  # cached: its last token is a query row once more, and writes nothing
                rows.append((above, len(above.ids) - 1, 1))
                start[above] = count - (len(above.ids) - 1)
                count += 1
        reads = [
            start[job.node] + read if read >= 0 else start[job.node.parent] + len(job.node.parent.ids) - 1
            for job in ready
            for read in job.reads
        ]
        ids = torch.tensor([t for node, first, n in rows for t in node.ids[first : first + n]], dtype=torch.int32)
        plan = build_plan(self.forest, rows, self.heads, machine=self.model.machine)
        out = self.model.forward(ids, plan, self.forest.pool, torch.tensor(reads, dtype=torch.int32), output="hidden")
        for node, first, n in rows:
            counters = node.owner.counters
            new = max(0, first + n - max(node.seen, first))
            counters.verifier_prefilled += new
            counters.verifier_recomputed += n - new
            counters.verifier_flops += self.model.flops(node.pos0 + first, n, "kv")
            node.cached = max(node.cached, first + n)
            node.seen = max(node.seen, node.cached)
        at = 0
        for job in ready:
            hidden[job.node] = out[at : at + len(job.reads)]
            at += len(job.reads)
