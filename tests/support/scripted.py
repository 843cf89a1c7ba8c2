"""A policy and verifier that follow a script, with a ledger of every KV release: strategies are tested
without a model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ttsearch.budget import Budget, Limits
from ttsearch.types import Cost, ModelCost, Problem, SearchNode

Step = tuple  # (text, score) or (text, score, finish_reason); the reason "step" is the default


@dataclass
class ScriptedPolicy:
    """`script` maps a path key to its step, or is a function of the path key. Scores are withheld unless
    asked for.
    """

    script: Mapping[tuple[int, ...], Step] | Callable[[tuple[int, ...]], Step]
    budget: Budget
    has_verifier: bool = True
    pause_after: int | None = None  # after so many expand calls, the next one waits forever (to be cancelled)
    fail_after: int | None = None
    root: SearchNode = field(default_factory=lambda: SearchNode(num_tokens=3, handle="root"))
    expanded: list[tuple[tuple[tuple[int, ...], ...], object]] = field(default_factory=list)
    released: list[tuple[int, ...]] = field(default_factory=list)
    held: set[tuple[int, ...]] = field(default_factory=set)
    peak_held: int = 0
    closed: bool = False
    cancelled: int = 0
    waiting: asyncio.Event = field(default_factory=asyncio.Event)
    _ordinals: dict[tuple[int, ...], int] = field(default_factory=dict)
    _cost: Cost = field(default_factory=Cost)

    async def expand(self, nodes, n, until="step", score=True, limits: Limits | None = None):
        limits = limits or self.budget.limits
        counts = [n] * len(nodes) if isinstance(n, int) else list(n)
        if len(counts) != len(nodes):
            raise ValueError(
                f"n must be one number or one per node, got {len(counts)} for {len(nodes)} nodes"
            )
        for node in nodes:
            if node.finished or node.released:
                raise ValueError(f"node {node.path_key} is {'finished' if node.finished else 'released'}")
        self.expanded.append((tuple(node.path_key for node in nodes), n))
        if self.pause_after is not None and len(self.expanded) > self.pause_after:
            self.waiting.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if self.fail_after is not None and len(self.expanded) > self.fail_after:
            raise RuntimeError("the engine broke")
        await asyncio.sleep(0)
        ends = []
        for node, count in zip(nodes, counts, strict=True):
            for _ in range(count):
                child = self._child(node, score)
                while until == "end" and not child.finished and len(child.path_key) < limits.max_steps:
                    grandchild = self._child(child, score)
                    self.release([child])
                    child = grandchild
                ends.append(child)
        return ends

    def _child(self, parent: SearchNode, score: bool) -> SearchNode:
        ordinal = self._ordinals.get(parent.path_key, 0)
        self._ordinals[parent.path_key] = ordinal + 1
        key = (*parent.path_key, ordinal)
        text, value, reason = (*(self.script(key) if callable(self.script) else self.script[key]), "step")[:3]
        step_score = value if score and self.has_verifier and reason != "refused" else None
        child = SearchNode(
            parent, key, text, num_tokens=len(text), step_score=step_score, finished=reason != "step",
            finish_reason=reason, logprob=-float(len(text)), handle=key,
        )  # fmt: skip
        parent.children.append(child)
        self.held.add(key)
        self.peak_held = max(self.peak_held, len(self.held))
        self._cost += Cost(policy=ModelCost(tokens_decoded=len(text), flops=2.0 * len(text)))
        return child

    def release(self, nodes) -> None:
        for node in nodes:
            if node is self.root or node.released:
                raise ValueError(f"node {node.path_key} was released before, or is the root")
            node.released, node.handle = True, None
            self.released.append(node.path_key)
            self.held.remove(node.path_key)

    def cost(self) -> Cost:
        return self._cost

    def close(self) -> None:
        self.closed = True


@dataclass
class ScriptedBackend:
    """`script` as for the policy, or a dict from problem id to one."""

    script: object
    has_verifier: bool = True
    options: dict = field(default_factory=dict)
    opened: list[ScriptedPolicy] = field(default_factory=list)

    def open(self, problem: Problem, budget: Budget) -> ScriptedPolicy:
        script = self.script
        if isinstance(script, dict) and problem.id in script:
            script = script[problem.id]
        policy = ScriptedPolicy(script, budget, self.has_verifier, **self.options)
        self.opened.append(policy)
        return policy

    def close(self) -> None:
        pass
