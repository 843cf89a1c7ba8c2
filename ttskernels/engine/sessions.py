"""The problems that are open, and their roots. On the engine's thread."""

from __future__ import annotations

import itertools

from ttskernels.engine.policy import PolicyRunner
from ttskernels.engine.prompts import Prompts
from ttskernels.engine.residency import Residency
from ttskernels.engine.scorer import ScoreRunner
from ttskernels.engine.work import Session
from ttskernels.kv.forest import Forest, Node
from ttskernels.kv.pool import ByteBudget


class Sessions:
    """Opens and closes sessions over the runners' forests, which share `budget`; `prompt_bytes` as in `Engine`."""

    def __init__(
        self, residency: Residency, budget: ByteBudget, policy: PolicyRunner | None, scorer: ScoreRunner | None, prompt_bytes: int
    ):
        self.live, self.budget = residency.sessions, budget
        self.policy, self.scorer = policy, scorer
        self.prompts = {forest: Prompts(forest, prompt_bytes) for forest, _ in residency.forests}
        residency.spares += [(forest, lambda kept=kept: kept.nodes) for forest, kept in self.prompts.items()]
        self._orders = itertools.count()

    def open(self, prompt: list[int] | None, verifier_prompt: list[int] | None, beside: Session | None) -> Session:
        session = Session(next(self._orders) if beside is None else beside.order, None, None)
        if prompt is not None:
            session.root = self._root(self.policy.forest, prompt, session, session.policy_nodes)
        if verifier_prompt is not None:
            session.verifier_root = self._root(self.scorer.forest, verifier_prompt, session, session.verifier_nodes)
        self.live.append(session)
        return session

    def _root(self, forest: Forest, ids: list[int], session: Session, nodes: set[Node]) -> Node:
        node = self.prompts[forest].open(ids)
        node.owner = session
        nodes.add(node)
        return node

    def close(self, session: Session) -> None:
        """Drop the session's branches and jobs and release all its nodes. Idempotent."""
        if session.closed:
            return
        if self.policy is not None:
            self.policy.drop(lambda branch: branch.session is session)
            self.policy.ahead.close(session)
        if self.scorer is not None:
            self.scorer.drop(session)
            self._sweep(self.scorer.forest, session.verifier_nodes, session.verifier_root)
        if self.policy is not None:
            self._sweep(self.policy.forest, session.policy_nodes, session.root)
        session.closed = True
        self.live.remove(session)

    def _sweep(self, forest: Forest, nodes: set[Node], root: Node | None) -> None:
        for node in nodes:
            while node.refs > (node is root):
                forest.release(node)
        nodes.clear()
        if root is not None and not root.released:
            self.prompts[forest].close(root)

    def close_all(self) -> None:
        for session in list(self.live):
            self.close(session)
        self.forget_prompts()

    def forget_prompts(self) -> None:
        for kept in self.prompts.values():
            kept.clear()

    def note_peak(self) -> None:
        """What is kept of closed sessions is nobody's peak."""
        used = self.budget.used_bytes - sum(kept.used_bytes for kept in self.prompts.values())
        for session in self.live:
            session.counters.peak_kv_bytes = max(session.counters.peak_kv_bytes, used)
