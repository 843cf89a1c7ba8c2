"""The slowest right policy: transformers, one branch at a time, every prefix read again."""

from __future__ import annotations

import asyncio
import functools
from dataclasses import dataclass, field

import torch
from ttsearch.budget import Budget
from ttsearch.prompts import TextPolicy
from ttsearch.types import Cost, Problem, SearchNode
from ttsearch.verifiers import PrmPath, TextVerifier

from ttskernels.engine.keys import as_int64, child_key, root_key


@dataclass
class PlainBackend:
    model: torch.nn.Module
    text: TextPolicy
    prm: torch.nn.Module | None = None  # token classifier
    prm_text: TextVerifier | None = None

    @property
    def has_verifier(self) -> bool:
        return self.prm is not None

    def open(self, problem: Problem, budget: Budget) -> PlainPolicy:
        return PlainPolicy(self, problem, budget)

    def close(self) -> None:
        pass


@dataclass
class _Ids:
    policy: list[int]
    verifier: PrmPath | None


@dataclass
class PlainPolicy:
    backend: PlainBackend
    problem: Problem
    budget: Budget
    root: SearchNode = field(init=False)
    spent: Cost = field(default_factory=Cost)
    _ordinals: dict[tuple[int, ...], int] = field(default_factory=dict)

    def __post_init__(self):
        ids = self.backend.text.prompt_ids(self.problem.prompt)
        read = self.backend.prm_text.start(self.problem.prompt) if self.backend.prm_text else None
        self.root = SearchNode(num_tokens=len(ids), handle=_Ids(ids, read))

    async def expand(self, nodes, n, until="step", score=True, limits=None):
        limits, ends = limits or self.budget.limits, []
        for node, count in zip(nodes, [n] * len(nodes) if isinstance(n, int) else n, strict=True):
            for _ in range(count):
                child = self._child(node, score, limits)
                while until == "end" and not child.finished and len(child.path_key) < limits.max_steps:
                    child, inner = self._child(child, score, limits), child
                    self.release([inner])
                ends.append(child)
                await asyncio.sleep(0)
        return ends

    def _child(self, parent: SearchNode, score: bool, limits) -> SearchNode:
        text, ordinal = self.backend.text, self._ordinals.get(parent.path_key, 0)
        self._ordinals[parent.path_key] = ordinal + 1
        key = (*parent.path_key, ordinal)
        root = root_key(self.budget.seed, self.problem.id)
        draw = torch.Generator().manual_seed(as_int64(functools.reduce(child_key, key, root)))
        room = min(limits.max_step_tokens, limits.max_tokens - parent.path_tokens())
        ids, state, logprob = [], 0, 0.0
        while state >= 0 and len(ids) < room:
            logits = self._logits(parent.handle.policy + ids)
            logp = (logits / (self.budget.temperature or 1.0)).log_softmax(-1)
            if self.budget.temperature:
                token = int(torch.multinomial(logp.exp(), 1, generator=draw))
            else:
                token = int(logp.argmax())
            logprob += float(logp[token])
            ids.append(token)
            state = int(text.next_state[state, token])
        reason = text.finish_reason(state, ids[-1])
        node = SearchNode(
            parent, key, text.decode(ids), len(ids), None, reason != "step", reason, logprob,
            _Ids(parent.handle.policy + ids, parent.handle.verifier),
        )  # fmt: skip
        self.spent.policy.tokens_decoded += len(ids)
        if score and self.backend.prm is not None:
            self._score(node)
        parent.children.append(node)
        return node

    @torch.inference_mode()
    def _logits(self, ids):
        return self.backend.model(torch.tensor([ids])).logits[0, -1].float()

    @torch.inference_mode()
    def _score(self, node: SearchNode) -> None:
        text = self.backend.prm_text
        new = text.extend(node.handle.verifier, [node.text])
        if not text.fits(new.length):
            node.finished, node.finish_reason = True, "refused"
            return
        if new.reads:
            good = self.backend.prm(torch.tensor([new.path.ids])).logits[0].float().softmax(-1)[:, 1]
            node.step_score = min(float(good[new.keep + r]) for r in new.reads)
        node.handle.verifier = new.path

    def release(self, nodes) -> None:
        for node in nodes:
            if node.released or node is self.root:
                raise ValueError(f"node {node.path_key} was released before, or is the root")
            node.released, node.handle = True, None

    def cost(self) -> Cost:
        return self.spent

    def close(self) -> None:
        self.root.handle = None
