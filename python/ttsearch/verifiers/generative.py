"""Verifiers that write before they judge, behind the `Verifier` protocol. They decode on an engine of their own."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ttskernels  # noqa: F401, I001 - before torch: it sets how OpenMP threads wait
import torch

from ttskernels.engine.batcher import Engine
from ttskernels.engine.keys import root_key
from ttskernels.models.heads import HeadSpec
from ttskernels.models.model import load_model

from ..stops import compile_stops
from ..tokenizer import load_tokenizer
from ..types import ModelCost, Scored
from .genprm import GenPrm
from .thinkprm import ThinkPrm
from .writer import Spelling, TokenWriter
from .written import GenerativeFamily, State, Verdict

GENERATIVE: dict[str, GenerativeFamily] = {family.name: family for family in (ThinkPrm(), GenPrm())}
MAX_STEPS = 64  # steps of the longest solution whose end a verifier is held to


@dataclass(eq=False)
class _Handle:
    """A solution so far. `key` depends on the seed, the problem and the steps alone, never on who asked first."""

    state: State
    key: int


class GenerativeVerifier:
    """A generative family on an engine; every verification of every problem decodes in one loop.

    `failures` counts, by reason, verifications that have no score.
    """

    def __init__(self, engine: Engine, tokenizer, family: GenerativeFamily, seed: int = 0):
        self.engine, self.tokenizer, self.family, self.seed = engine, tokenizer, family, seed
        config = engine.policy_model.config
        self._spelling = Spelling(tokenizer, config.vocab)
        self._stop_ids = stop_ids(tokenizer, config.eos_ids, family.stops(MAX_STEPS))
        self.failures: Counter[str] = Counter()

    @classmethod
    def load(
        cls,
        source: str | Path,
        family: GenerativeFamily,
        *,
        dtype: torch.dtype = torch.bfloat16,
        impl: str = "auto",
        kv_bytes: int,
        seed: int = 0,
    ) -> GenerativeVerifier:
        """Load a chat model that is policy and scorer in one.

        Raises:
            ValueError: no chat template; a choice is not one token; a tokenizer that changes text given in pieces.
        """
        tokenizer = load_tokenizer(source)
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"generative family {family.name!r} needs a chat template, the tokenizer of {source} has none")
        rows = Spelling(tokenizer, None).question(family.forced, family.choices)[1]
        head = HeadSpec(rows=rows, squash="none", mix=(1, -1))  # log-odds
        model = load_model(source, dtype, impl, head, keep_lm_head=True)
        config = model.config
        stops = family.stops(MAX_STEPS)
        ended = stop_ids(tokenizer, config.eos_ids, stops)
        table = torch.from_numpy(compile_stops(tokenizer, ended, config.vocab, stops, boxes=False).copy())
        return cls(Engine(model, model, next_state=table, kv_bytes=kv_bytes), tokenizer, family, seed)

    def open(self, problem: str, *, max_new_tokens: int = 0, beside: Any = None) -> GenerativeSession:
        """See `ttsearch.protocols.Verifier`; the policy's session (`beside`) is on another engine."""
        return GenerativeSession(self, problem)

    def writer(self) -> TokenWriter:
        return TokenWriter(self.engine, self._spelling, self.family, self._stop_ids)

    def close(self) -> None:
        self.engine.shutdown()

    def __enter__(self) -> GenerativeVerifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class GenerativeSession:
    """One problem; see `ttsearch.protocols.VerifierSession`. `failures` as for the verifier."""

    def __init__(self, verifier: GenerativeVerifier, problem: str):
        self._verifier, self._family, self._tokenizer = verifier, verifier.family, verifier.tokenizer
        self._writer = verifier.writer()
        state, text, stable = self._family.start(self._tokenizer, problem)
        chain = self._writer.open(text, stable, self._family.max_tokens)
        self.root = _Handle(replace(state, root=chain), root_key(verifier.seed, problem))
        self.failures: Counter[str] = Counter()
        self.verdicts: dict[tuple[str, ...], Verdict] = {}  # by the steps so far: what was written

    async def score(self, parent: _Handle, steps: Sequence[str]) -> Scored:
        """See `VerifierSession.score`. A step whose verifications all failed has score None, and so has one without text."""
        if isinstance(steps, str) or not steps:
            raise ValueError(f"steps must be a sequence of at least one step, got {steps!r}")
        handles: list[_Handle] = []
        verdicts: list[asyncio.Task[Verdict] | None] = []
        at, refused = parent, None
        try:
            for step in steps:
                text = step.strip()
                if not text:
                    verdicts.append(None)
                    continue
                key = root_key(at.key, text)
                grown = await self._family.advance(self._writer, self._tokenizer, at.state, text, key)
                if grown is None:
                    limit = self._writer.limit
                    refused = f"the prompt of step {len(at.state.steps) + 1} leaves no room: the verifier allows {limit} tokens"
                    break
                at = _Handle(grown[0], key)
                handles.append(at)
                verdicts.append(grown[1])
            found = await asyncio.gather(*[v for v in verdicts if v is not None])
        except BaseException:
            for verdict in verdicts:
                if verdict is not None:
                    verdict.cancel()
            self.release(handles)
            raise
        for handle, verdict in zip(handles, found, strict=True):
            self.failures.update(verdict.failures)
            self._verifier.failures.update(verdict.failures)
            self.verdicts[handle.state.steps] = verdict
        ...
