"""Verifiers that write before they judge, behind the `Verifier` protocol. They decode on an engine of their own."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import ttskernels  # noqa: F401, I001 - before torch: it sets how OpenMP threads wait
from ttskernels.engine.batcher import Engine
from ttskernels.engine.keys import root_key
from ttskernels.models import load_model
from ttskernels.models.heads import HeadSpec

from ..stops import compile_stops
from ..tokenizer import load_tokenizer
from ..types import ModelCost, Scored
from .render import clean
from .running import Running
from .session import DEFAULT_KV_BYTES, result_name
from .spelling import Spelling
from .writer import TokenWriter
from .written import GenerativeFamily, State, Verdict

MAX_STEPS = 64  # steps of the longest solution whose end a verifier is held to


@dataclass(eq=False)
class _Handle:
    """A solution so far. `key` depends on the seed, the problem and the steps alone, never on who asked first."""

    state: State
    key: int
    running: Running


class _Refused(Exception):
    """A path is too long for the verifier."""


class GenerativeVerifier:
    """A generative family on an engine; the verifications of every problem decode in one loop.

    `failures` counts, by reason, the verifications that have no score.
    """

    def __init__(self, engine: Engine, tokenizer, family: GenerativeFamily, rows: tuple[int, int], name: str, seed: int):
        self.engine, self.tokenizer, self.family, self.seed = engine, tokenizer, family, seed
        config = engine.policy_model.config
        self._rows, self._spelling = rows, Spelling(tokenizer, config.vocab)
        self._ends = draft_ends(tokenizer, config.eos_ids, family.stops(MAX_STEPS))
        self.failures: Counter[str] = Counter()
        self.name = name

    @classmethod
    def load(
        cls,
        source: str | Path,
        family: GenerativeFamily,
        *,
        dtype: torch.dtype = torch.bfloat16,
        impl: str = "auto",
        kv_bytes: int = DEFAULT_KV_BYTES,
        seed: int = 0,
        device: str = "cpu",
        weights: str = "auto",
        kv: str = "auto",
    ) -> GenerativeVerifier:
        """Load a chat model that writes and is read: policy and verifier of one engine.

        Args:
            source: checkpoint folder, hub id or .gguf file. seed: with the problem and the steps it fixes every draft.
        Raises:
            ValueError: no chat template; choices that are not one token each; a tokenizer that changes text in pieces.
        """
        tokenizer = load_tokenizer(source)
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"generative family {family.name!r} writes in a chat, and the tokenizer of {source} has no chat template; "
                "pass an instruction-tuned model"
            )
        rows = Spelling(tokenizer, None).question(family.forced, family.choices)[1]
        head = HeadSpec(rows=rows, squash="none", mix=(1, -1))  # log-odds
        model = load_model(source, dtype, impl, head, keep_lm_head=True, device=device, weights=weights, kv=kv)
        stops = family.stops(MAX_STEPS)
        check_overlap(stops)
        ids = draft_ends(tokenizer, model.config.eos_ids, stops)
        table = torch.from_numpy(compile_stops(tokenizer, ids, model.config.vocab, stops, boxes=False).copy())
        name = result_name(source, family, dtype, weights, kv, seed)
        return cls(Engine(model, model, next_state=table, kv_bytes=kv_bytes), tokenizer, family, rows, name, seed)

    def open(self, problem: str, *, max_new_tokens: int = 0, beside: Any = None) -> GenerativeSession:
        """See `ttsearch.protocols.Verifier`. The policy has an engine of its own, so `beside` says nothing here."""
        return GenerativeSession(self, problem)

    def writer(self) -> TokenWriter:
        return TokenWriter(
            self.engine, self._spelling, self.family.choices, self._rows, self._ends, self.family.sampling
        )

    def close(self) -> None:
        self.engine.shutdown()

    def __enter__(self) -> GenerativeVerifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class GenerativeSession:
    """One problem; see `ttsearch.protocols.VerifierSession`.

    `verdicts`: what was written and how it was judged, by the steps so far. `failures`: as the verifier's.
    """

    def __init__(self, verifier: GenerativeVerifier, problem: str):
        self._verifier, self._writer = verifier, verifier.writer()
        family = verifier.family
        state, text, stable = family.start(verifier.tokenizer, problem)
        chain = self._writer.open(text, stable, family.max_tokens)
        self.root = _Handle(replace(state, root=chain), root_key(verifier.seed, clean(problem)), Running())
        self.failures: Counter[str] = Counter()
        self.verdicts: dict[tuple[str, ...], Verdict] = {}

    async def score(self, parent: _Handle, steps: Sequence[str]) -> Scored:
        """See `VerifierSession.score`. A step has no score (None) if it has no text, or if every verification failed."""
        if isinstance(steps, str) or not steps:
            raise ValueError(f"steps must be a sequence of at least one step, got {steps!r}")
        grown: list[tuple[_Handle, asyncio.Task[Verdict] | None]] = []
        try:
            at = parent
            for step in steps:
                at, verdict = await self._advance(at, clean(step).strip())
                grown.append((at, verdict))
            verdicts = [verdict and await verdict for _, verdict in grown]
        except _Refused as refused:
            await self._abandon(grown)
            return Scored(None, [None] * len(steps), str(refused))
        except BaseException:
            await self._abandon(grown)
            raise
        self.release([handle for handle, _ in grown[:-1]])
        for (handle, _), verdict in zip(grown, verdicts, strict=True):
            if verdict is not None:
                self.verdicts[handle.state.steps] = verdict
                self.failures.update(verdict.failures)
                self._verifier.failures.update(verdict.failures)
        scores = [verdict and verdict.score for verdict in verdicts]
        last = replace(grown[-1][0], running=parent.running.fold(scores))
        judged = [verdict for verdict in verdicts if verdict is not None]
        reasons = Counter(reason for verdict in judged if verdict.score is None for reason in verdict.failures)
        failed = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        return Scored(
            last, scores, None, last.running.scores(), sum(verdict.tokens for verdict in judged),
            failed=f"no verification of a step was judged: {failed}" if failed else None,
        )  # fmt: skip

    async def _advance(self, at: _Handle, step: str) -> tuple[_Handle, asyncio.Task[Verdict] | None]:
        if not step:
            if at.state.held is not None:
                self._writer.retain(at.state.held)
            return at, None
        family, key = self._verifier.family, root_key(at.key, step)
        grown = await family.advance(self._writer, self._verifier.tokenizer, at.state, step, key)
        if grown is None:
            limit = self._writer.limit
            raise _Refused(f"step {len(at.state.steps) + 1} leaves no room for a verification: the model allows {limit} tokens")
        return _Handle(grown[0], key, at.running), grown[1]

    async def _abandon(self, grown: list[tuple[_Handle, asyncio.Task[Verdict] | None]]) -> None:
        tasks = [verdict for _, verdict in grown if verdict is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.release([handle for handle, _ in grown])

    def release(self, handles: Iterable[_Handle]) -> None:
        self._writer.release(*(handle.state.held for handle in handles if handle.state.held is not None))

    def cost(self) -> ModelCost:
        c = self._writer.session.counters
        return ModelCost(
            tokens_prefilled=c.policy_prefilled + c.verifier_prefilled, tokens_decoded=c.policy_decoded,
            tokens_reused=c.policy_reused + c.verifier_reused, flops=c.policy_flops + c.verifier_flops,
            tokens_recomputed=c.policy_recomputed + c.verifier_recomputed,
        )  # fmt: skip

    @property
    def seconds(self) -> float:
        c = self._writer.session.counters
        return c.prefill_seconds + c.decode_seconds + c.score_seconds

    def close(self) -> None:
        self._writer.close()


def draft_ends(tokenizer, eos_ids: Iterable[int], stops: Sequence[str]) -> dict[int, str]:
    """Ids that end a draft: of the end of text, and of special tokens that are stop texts (they have no bytes)."""
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return dict.fromkeys(eos_ids, "") | {special[stop]: stop for stop in stops if stop in special}


def check_overlap(stops: Sequence[str]) -> None:
    """Raise where a draft that does not stop at one text would be blind for another that began inside it."""
    for one in stops:
        for other in stops:
            if one != other and any(one.endswith(other[:n]) for n in range(1, len(other))):
                raise ValueError(f"stop texts must not overlap: {one!r} ends as {other!r} begins; make one of them longer")
