"""The local engine behind the `Policy` protocol: text on this side, token ids and KV handles on the other."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ttskernels  # noqa: F401, I001 - before torch: it sets how OpenMP threads wait
from ttskernels.engine.ahead import Wish
from ttskernels.engine.batcher import Engine
from ttskernels.engine.keys import root_key
from ttskernels.engine.work import Sampling, Session, StepEnd
from ttskernels.models import load_model
from ttskernels.models.sources import resolve

from ..budget import Budget, Limits
from ..dtypes import torch_dtype
from ..prompts import TextPolicy, detect_style
from ..protocols import Verifier, VerifierSession
from ..tokenizer import load_tokenizer
from ..types import Cost, ModelCost, Problem, SearchNode
from ..verifiers import detect_family
from ..verifiers.families import Family
from ..verifiers.session import DEFAULT_KV_BYTES, PROMPT_SHARE, EngineVerifier, load_verifier, place, read_verifier
from ..verifiers.written import GenerativeFamily
from .lookahead import SPECULATE, Speculate, next_parents

LIKELIHOOD = (
    "likelihood"  # as verifier: a step scores the geometric mean of its own token probabilities; no second model
)
AHEAD_ROWS = 16  # of a decode iteration; bench/LOG.md, "step search", has how it was chosen


@dataclass(eq=False)
class _Handle:
    """What a search node holds in the engine."""

    policy: Any  # forest node, None once given back
    verifier: Any  # handle of the verifier's session, None where the path was not scored
    key: int
    children: int = 0  # ordinals handed out


class LocalBackend:
    """A policy on an engine and, optionally, any verifier, often on the same engine. Serves every problem at once."""

    def __init__(
        self,
        engine: Engine,
        text_policy: TextPolicy,
        verifier: Verifier | None = None,
        likelihood: bool = False,
        speculate: Speculate = "off",
        settings: dict[str, Any] | None = None,
    ):
        self.engine, self.text_policy, self.verifier, self.likelihood = engine, text_policy, verifier, likelihood
        self.speculate, self.settings = speculate, settings
        self.has_verifier = likelihood or verifier is not None

    @classmethod
    def load(
        cls,
        policy: str | Path,
        verifier: str | Path | None = None,
        *,
        prm_family: str | Path | Family | None = None,
        prm_reference: str | Path | None = None,
        prm_base: str | Path | None = None,
        prompt_style: str | None = None,
        kv_bytes: int | None = None,
        dtype: str = "bf16",
        impl: str = "auto",
        device: str = "cpu",
        weights: str = "auto",
        kv: str = "auto",
        speculate: Speculate = "sure",
        keep_prompts: bool = True,
    ) -> LocalBackend:
        """Load both models and start the engine.

        Args:
            policy, verifier: checkpoint folder, hub id or .gguf file. verifier="likelihood" needs no second model: a step
                scores the geometric mean of its tokens' probabilities under the policy (a baseline, not a PRM).
            prm_family, prompt_style: see `ttsearch.verifiers` and `ttsearch.prompts`; None: seen in the checkpoint.
            prm_reference, prm_base: of an implicit PRM, of an adapter or PQM; see `verifiers.session.load_verifier`.
            kv_bytes: KV budget of both models together; None: 2 GiB. A generative verifier has as much again, for itself.
            dtype: "bf16", "fp16" or "fp32", of weights, and of KV unless `kv` says otherwise. impl: "auto", "cpu" or "reference".
            device: "cpu", or "cuda" for both models on a GPU.
            weights: of both models on a CPU: "auto", "float", "int16", "int8" or "calibrated"; see `load_model`.
            kv: how both models keep K and V: "auto", "float", on a CPU "int16" or "int8", on a GPU "fp8"; likewise.
            speculate: begin the next step of paths while the last of their siblings are still decoded: "sure", of those that
                no sibling can push out any more; "likely", also of those that will probably stay; "off". Trees and scores
                are the same.
            keep_prompts: a problem that is opened again finds its prompts computed, in up to an eighth of `kv_bytes`, as long
                as nobody needs the pages: its cost is smaller by them then, its trees and scores are the same.
        """
        if speculate not in SPECULATE:
            raise ValueError(f"speculate must be one of {', '.join(SPECULATE)}, got {speculate!r}")
        model = load_model(policy, torch_dtype(dtype), impl, device=device, weights=weights, kv=kv)
        tokenizer = load_tokenizer(policy)
        style = prompt_style or detect_style(tokenizer, model.config.model_type, place(policy))
        text_policy = TextPolicy(tokenizer, style, model.config.eos_ids, model.config.vocab)
        likelihood = verifier == LIKELIHOOD
        scorer = text_verifier = writer = None
        if verifier is not None and not likelihood:
            family = detect_family(resolve(verifier, torch_dtype(dtype)), prm_family, verifier)
            if isinstance(family, GenerativeFamily):
                writer = load_verifier(
                    verifier, family, dtype=dtype, impl=impl, kv_bytes=kv_bytes, reference=prm_reference, base=prm_base,
                    device=device, weights=weights, kv=kv,
                )
            else:
                scorer, text_verifier = read_verifier(
                    verifier, family, dtype, impl, prm_reference, prm_base, device=device, weights=weights, kv=kv
                )
        table = torch.from_numpy(text_policy.next_state.copy())
        rows = AHEAD_ROWS if speculate != "off" else 0
        kv_bytes = DEFAULT_KV_BYTES if kv_bytes is None else kv_bytes
        prompt_bytes = kv_bytes // PROMPT_SHARE if keep_prompts else 0
        engine = Engine(model, scorer, next_state=table, kv_bytes=kv_bytes, prompt_bytes=prompt_bytes, ahead_rows=rows)
        prm, reference, base = writer, place(prm_reference), place(prm_base)
        if scorer:
            prm = EngineVerifier(engine, text_verifier, source=verifier, settings=(dtype, weights, kv, reference, base))
        settings = {  # what trees and scores depend on: records of another backend are not continued
            "policy": place(policy), "verifier": LIKELIHOOD if likelihood else prm and prm.name,
            "verifier_source": prm and place(verifier), "prm_reference": reference, "prm_base": base,
            "prompt_style": text_policy.style.name, "dtype": dtype, "impl": impl, "device": device, "weights": weights, "kv": kv,
        }  # fmt: skip
        return cls(engine, text_policy, prm, likelihood, speculate, settings)

    def open(self, problem: Problem, budget: Budget) -> LocalPolicy:
        return LocalPolicy(self, problem, budget)

    def close(self) -> None:
        if self.verifier is not None:
            self.verifier.close()
        self.engine.shutdown()

    def __enter__(self) -> LocalBackend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LocalPolicy:
    """A session of one problem; see `ttsearch.protocols.Policy`."""

    def __init__(self, backend: LocalBackend, problem: Problem, budget: Budget):
        self._backend, self._engine, self._budget = backend, backend.engine, budget
        self._opened = time.perf_counter()
        self._sampling = Sampling(budget.temperature, budget.top_k, budget.top_p, budget.min_p)
        prompt = backend.text_policy.prompt_ids(problem.prompt)
        self._prompt_tokens = len(prompt)
        room = self._engine.policy_model.config.max_positions - len(prompt)
        self._max_tokens = min(budget.max_tokens, max(room, 1))  # the model's own limit ends a path like the budget's
        self._session: Session = self._engine.open(prompt, max_new_tokens=self._max_tokens)
        self._verifier: VerifierSession | None = None
        if backend.verifier is not None:
            try:
                self._verifier = backend.verifier.open(
                    problem.prompt, max_new_tokens=self._max_tokens, beside=self._session
                )
            except BaseException:
                self._engine.close(self._session)
                raise
        verifier_root = self._verifier.root if self._verifier else None
        handle = _Handle(self._session.root, verifier_root, root_key(budget.seed, problem.id))
        self.root = SearchNode(num_tokens=len(prompt), handle=handle)

    async def expand(
        self,
        nodes: Sequence[SearchNode],
        n: int | Sequence[int],
        until: str = "step",
        score: bool = True,
        limits: Limits | None = None,
    ) -> list[SearchNode]:
        counts = [n] * len(nodes) if isinstance(n, int) else list(n)
        if len(counts) != len(nodes):
            raise ValueError(f"n must be one number or one per node, got {len(counts)} for {len(nodes)} nodes")
        if until not in ("step", "end"):
            raise ValueError(f'until must be "step" or "end", got {until!r}')
        for node in nodes:
            if node.finished or node.released or not isinstance(node.handle, _Handle):
                state = "finished" if node.finished else "released" if node.released else "of another session"
                raise ValueError(f"node {node.path_key} is {state} and cannot be expanded")
        limits = limits or self._budget.limits
        group = object()
        ordinals = [self._ordinals(node, count) for node, count in zip(nodes, counts, strict=True)]
        chains = [
            _Chain(self, node, ordinal, score and self._backend.has_verifier)
            for node, own in zip(nodes, ordinals, strict=True)
            for ordinal in own
        ]
        lookahead = _Lookahead(self, chains, limits, group) if until == "step" and score else None
        inbox: dict[tuple[SearchNode, int], _Chain] = {(c.parent, c.ordinal): c for c in chains}
        loop = asyncio.get_running_loop()
        for node, own in zip(nodes, ordinals, strict=True):
            handle = node.handle

            def on_step(ordinal: int, end: StepEnd | BaseException, node: SearchNode = node) -> None:
                try:
                    loop.call_soon_threadsafe(inbox[node, ordinal].events.put_nowait, end)
                except RuntimeError:  # the caller's loop is gone; its session is about to be closed
                    return

            self._engine.branch(
                self._session, handle.policy, key=handle.key, path_key=node.path_key,
                ordinals=own, **self._decoding(limits),
                max_steps=limits.max_steps - len(node.path_key) if until == "end" else 1, group=group, on_step=on_step,
            )  # fmt: skip
        tasks = [asyncio.ensure_future(chain.run()) for chain in chains]
        if lookahead is not None and lookahead.useful:
            for task in tasks:
                task.add_done_callback(lookahead)
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            self._engine.cancel(group)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.release([c.last for c in chains if c.last is not None and c.last.handle and not c.last.released])
            raise

    def _decoding(self, limits: Limits) -> dict[str, Any]:
        """What the engine decodes a step with."""
        max_length = self._prompt_tokens + min(limits.max_tokens, self._max_tokens)
        return dict(sampling=self._sampling, max_step_tokens=limits.max_step_tokens, max_length=max_length)

    def _ordinals(self, node: SearchNode, count: int) -> range:
        first = node.handle.children
        node.handle.children += count
        return range(first, first + count)

    def release(self, nodes: Iterable[SearchNode]) -> None:
        nodes, given = list(nodes), set()
        for node in nodes:
            if node.released or node is self.root or node in given:
                raise ValueError(f"node {node.path_key} was released before, or is the root")
            given.add(node)
        handles = [node.handle for node in nodes]
        for node in nodes:
            node.released, node.handle = True, None
        policy = [h.policy for h in handles if h.policy is not None]
        self._engine.release(self._session, policy=policy)
        if self._verifier is not None:
            self._verifier.release([h.verifier for h in handles if h.verifier is not None])

    def cost(self) -> Cost:
        c = self._session.counters
        policy = ModelCost(
            tokens_prefilled=c.policy_prefilled, tokens_decoded=c.policy_decoded, tokens_reused=c.policy_reused,
            tokens_speculated=c.policy_speculated, tokens_recomputed=c.policy_recomputed, flops=c.policy_flops,
        )  # fmt: skip
        verifier = self._verifier.cost() if self._verifier else ModelCost()
        score_seconds = self._verifier.seconds if self._verifier else 0.0
        known = c.prefill_seconds + c.decode_seconds + score_seconds
        other = max(0.0, time.perf_counter() - self._opened - known)
        return Cost(policy, verifier, c.prefill_seconds, c.decode_seconds, score_seconds, other, c.peak_kv_bytes)

    def close(self) -> None:
        if self._verifier is not None:
            self._verifier.close()
        self._engine.close(self._session)


class _Lookahead:
    """Tells the engine, at each child that is done, which ones will be continued; for a beam's `expand` of single steps."""

    def __init__(self, policy: LocalPolicy, chains: list[_Chain], limits: Limits, group: object):
        self._policy, self._limits, self._group, self._total = policy, limits, group, len(chains)
        self._done: list[SearchNode] = []
        self._wished = False
        backend = policy._backend
        self.useful = backend.speculate != "off" and backend.has_verifier and policy._budget.aggregate is not None

    def __call__(self, task: asyncio.Task[SearchNode]) -> None:
        if task.cancelled() or task.exception() is not None:
            return
        self._done.append(task.result())
        policy, limits = self._policy, self._limits
        budget, wishes = policy._budget, []
        if len(self._done) < self._total:
            parents, sure = next_parents(self._done, self._total, budget.width, budget.aggregate, policy._backend.speculate)
            for rank, node in enumerate(parents):
                if len(node.path_key) < limits.max_steps:
                    handle = node.handle
                    wishes.append(Wish(handle.policy, handle.key, node.path_key, 0, budget.width, rank < sure))
        if wishes or self._wished:
            policy._engine.ahead(policy._session, wishes, **policy._decoding(limits), group=self._group)
        self._wished = bool(wishes)


class _Chain:
    """One requested child, and the steps below it with until="end". Scores a chain once, when it has ended."""

    def __init__(self, policy: LocalPolicy, parent: SearchNode, ordinal: int, score: bool):
        self.policy, self.parent, self.ordinal, self.score = policy, parent, ordinal, score
        self.events: asyncio.Queue[StepEnd | BaseException] = asyncio.Queue()
        self.last: SearchNode | None = None  # the newest step; the only one that holds KV

    async def run(self) -> SearchNode:
        steps: list[SearchNode] = []
        more = True
        while more:
            end = await self.events.get()
            if isinstance(end, BaseException):
                raise end
            more = end.more
            steps.append(self._node(end, steps[-1] if steps else self.parent))
            self.last = steps[-1]
        if self.score and self.policy._backend.likelihood:
            for step in steps:
                step.step_score = math.exp(step.logprob / step.num_tokens)
        elif self.score:
            await self._score(steps)
        for parent, step in zip([self.parent, *steps], steps, strict=False):
            parent.children.append(step)
            step.released = step is not steps[-1]
        return steps[-1]

    def _node(self, end: StepEnd, parent: SearchNode) -> SearchNode:
        text_policy = self.policy._backend.text_policy
        reason = end.reason if end.reason != "end" else text_policy.finish_reason(-2, end.ids[-1])
        ordinal = self.ordinal if parent is self.parent else 0
        handle = None if end.more else _Handle(end.node, None, end.key)
        return SearchNode(
            parent, (*parent.path_key, ordinal), text_policy.decode(end.ids), len(end.ids), finished=end.finished,
            finish_reason=reason, logprob=end.logprob, handle=handle,
        )  # fmt: skip

    async def _score(self, steps: list[SearchNode]) -> None:
        """One call for all steps of the chain."""
        above, last = self.parent.handle.verifier, steps[-1]
        if above is None:
            raise ValueError(f"node {self.parent.path_key} was expanded with score=False; its children cannot be scored")
        scored = await self.policy._verifier.score(above, [step.text for step in steps])
        if scored.refused:
            last.finished, last.finish_reason = True, "refused"
            return
        last.handle.verifier, last.running = scored.handle, scored.running
        for step, score in zip(steps, scored.scores, strict=True):
            step.step_score = score
