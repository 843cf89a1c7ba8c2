"""A process reward model behind the `Verifier` protocol: steps as text go in, scores come out, KV stays with handles."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

import ttskernels  # noqa: F401, I001 - before torch: it sets how OpenMP threads wait
from ttskernels.engine.batcher import Engine
from ttskernels.engine.work import Session
from ttskernels.kv.forest import Node
from ttskernels.models import Model, load_model
from ttskernels.models.pair import PairModel, load_pair
from ttskernels.models.sources import resolve

from ..dtypes import torch_dtype
from ..protocols import Verifier
from ..tokenizer import load_tokenizer
from ..types import ModelCost, Scored
from .detect import detect_family
from .families import Family, get_family
from .family import PrmFamily
from .running import Running
from .text import Extension, PrmPath, TextVerifier
from .written import GenerativeFamily

DEFAULT_KV_BYTES = 2 << 30
PROMPT_SHARE = 8  # one part of so many of an engine's KV may hold prompts of problems that are done


def place(source: str | Path | None) -> str | None:
    """A hub id, or where a folder or file is; None stays."""
    return source and str(Path(source).resolve() if Path(source).exists() else source)


def result_name(source: str | Path, family: Family, *settings: Any) -> str:
    """What results say their scores come from: a hub id or the name of a folder, the family, and a code of it all.

    The code depends on the folder's whole path, every field of the family and the settings (a dtype, another model's `place`).
    """
    where = place(source)
    code = blake2b(repr((family, where, *map(str, settings))).encode(), digest_size=4).hexdigest()
    return f"{Path(where).name if Path(where).exists() else where} ({family.name}, {code})"


@dataclass(eq=False)
class EngineHandle:
    """A chain of scored steps: what was read, where its KV is, and the path's score so far."""

    path: PrmPath
    node: Node
    running: Running = field(default_factory=Running)
    sums: tuple[float, ...] = ()  # of a pair of models: log-ratio summed up to each token of the turn


class EngineVerifier:
    """A verifier that reads, on an engine which a policy may share.

    `owned`: the engine ends with `close`. `settings`: what else scores depend on, see `result_name`.
    """

    def __init__(
        self, engine: Engine, text: TextVerifier, owned: bool = False, source: str | Path = "", settings: Sequence[Any] = ()
    ):
        self.engine, self.text, self._owned = engine, text, owned
        self.name = result_name(source, text.family, *settings)

    def open(
        self, problem: str, *, max_new_tokens: int = 0, beside: Session | None = None
    ) -> EngineVerifierSession:
        """See `ttsearch.protocols.Verifier`; `beside` is an engine session whose turn this one shares."""
        session = LogRatioSession if self.text.family.read == "every token" else EngineVerifierSession
        return session(self, problem, max_new_tokens, beside)

    def close(self) -> None:
        if self._owned:
            self.engine.shutdown()

    def __enter__(self) -> EngineVerifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class EngineVerifierSession:
    """One problem; see `ttsearch.protocols.VerifierSession`."""

    def __init__(self, verifier: EngineVerifier, problem: str, max_new_tokens: int, beside: Session | None):
        self._engine, self._text = verifier.engine, verifier.text
        start = self._text.start(problem)
        if not self._text.fits(len(start.ids)):
            raise ValueError(
                f"the problem has {len(start.ids)} verifier tokens, this verifier reads at most {self._text.max_length}"
            )
        self._session = self._engine.open(None, list(start.ids), max_new_tokens=max_new_tokens, beside=beside)
        self.root = EngineHandle(start, self._session.verifier_root)

    async def score(self, parent: EngineHandle, steps: Sequence[str]) -> Scored:
        if isinstance(steps, str) or not steps:
            raise ValueError(f"steps must be a sequence of at least one step, got {steps!r}")
        at, scores, computed, kept = parent, [], 0, None
        while len(scores) < len(steps):  # some verifiers say one thing at a time
            rest = steps[len(scores) :]
            try:
                scored = await self._score_at_once(at, rest[:1] if self._text.stepwise else rest)
            finally:
                if at is not parent:
                    self.release([at])
            if scored.refused:
                return Scored(None, [None] * len(steps), scored.refused)
            at, scores, computed = scored.handle, scores + scored.scores, computed + scored.computed
            kept = scored.kept if kept is None else kept
        return Scored(at, scores, None, at.running.scores(), computed, kept)

    async def _score_at_once(self, parent: EngineHandle, steps: Sequence[str]) -> Scored:
        """Scores of the steps, or of the first of them: as many as can be read in one text."""
        extension = self._text.extend(parent.path, steps)
        if not self._text.fits(extension.length):
            return self._too_long(extension)
        node, scores = await self._run(parent.node, extension, len(extension.path.steps) - len(parent.path.steps))
        handle = EngineHandle(extension.path, node, parent.running.fold(scores))
        return Scored(handle, scores, None, handle.running.scores(), len(extension.ids), extension.keep)

    def _too_long(self, extension: Extension) -> Scored:
        refused = f"the path has {extension.length} verifier tokens, this verifier reads at most {self._text.max_length}"
        return Scored(None, [], refused)

    async def _run(self, parent: Node, extension: Extension, count: int) -> tuple[Node, list[float | None]]:
        scores: list[float | None] = [None] * count
        if not extension.reads:  # no visible text: nothing to read; children continue below the same prefix
            self._engine.retain(parent)
            return parent, scores
        node, values = await self._read(parent, extension)
        for owner, value in zip(extension.owner, values, strict=True):
            scores[owner] = value if scores[owner] is None else min(scores[owner], value)
        return node, scores

    async def _read(self, parent: Node, extension: Extension) -> tuple[Node, list[float]]:
        future = self._engine.score(
            self._session, parent, extension.ids, extension.reads, extension.keep, extension.targets
        )
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(self._drop)  # it may be under way
            raise

    def _drop(self, future: Future) -> None:
        if not future.cancelled() and future.exception() is None:
            self._engine.release(self._session, verifier=[future.result()[0]])

    def release(self, handles: Iterable[EngineHandle]) -> None:
        self._engine.release(self._session, verifier=[handle.node for handle in handles])

    def cost(self) -> ModelCost:
        c = self._session.counters
        return ModelCost(
            tokens_prefilled=c.verifier_prefilled, tokens_reused=c.verifier_reused,
            tokens_recomputed=c.verifier_recomputed, flops=c.verifier_flops,
        )  # fmt: skip

    @property
    def seconds(self) -> float:
        return self._session.counters.score_seconds

    def close(self) -> None:
        self._engine.close(self._session)


class LogRatioSession(EngineVerifierSession):
    """A step scores `scale` times the log-ratio of two models, summed over the turn up to its end behind that step."""

    async def _score_at_once(self, parent: EngineHandle, steps: Sequence[str]) -> Scored:
        extension = self._text.extend(parent.path, steps)
        if not self._text.fits(extension.length):
            return self._too_long(extension)
        if not extension.reads:
            self._engine.retain(parent.node)
            handle = EngineHandle(extension.path, parent.node, parent.running, parent.sums)
            return Scored(handle, [None], None, handle.running.scores(), 0, extension.keep)
        node, ratios = await self._read(parent.node, extension)
        turn = len(extension.path.ids) + 1 - len(self.root.path.ids)  # tokens of the turn, its end included
        sums = list(accumulate(ratios, initial=([0.0, *parent.sums])[turn - len(ratios)]))[1:]
        score = self._text.family.scale * sums[-1]
        kept = parent.sums[: turn - len(ratios)]
        handle = EngineHandle(extension.path, node, parent.running.fold([score]), (*kept, *sums[:-1]))
        return Scored(handle, [score], None, handle.running.scores(), len(extension.ids), extension.keep)


def read_verifier(
    source: str | Path,
    family: str | Path | PrmFamily | None = None,
    dtype: str = "bf16",
    impl: str = "auto",
    reference: str | Path | None = None,
    base: str | Path | None = None,
    device: str = "cpu",
    weights: str = "auto",
    kv: str = "auto",
) -> tuple[Model | PairModel, TextVerifier]:
    """A verifier's model and its text side, for an engine to be made with.

    Raises:
        ValueError: a checkpoint without a score head, of no known family, or whose tokenizer is not of its family; a family
            that compares two models without a reference, or a reference for another one.
    """
    found = detect_family(resolve(source, torch_dtype(dtype)), family, source)
    if isinstance(found, GenerativeFamily):
        raise ValueError(f"family {found.name!r} writes, and has an engine of its own; use load_verifier")
    compares = found.read == "every token"
    if compares and reference is None:
        raise ValueError(
            f"PRM family {found.name!r} compares two models; pass as reference the model that {source} was trained from"
        )
    if not compares and reference is not None:
        raise ValueError(f"reference must be None for PRM family {found.name!r}, which is one model, got {reference}")
    if compares and base is not None:
        raise ValueError(f"base must be None for PRM family {found.name!r}, which is two whole models, got {base}")
    tokenizer = load_tokenizer(source, base)
    if base is not None and found.token and found.token not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(found.token, special=True, normalized=False)])  # the next id, as in training
    text = TextVerifier(tokenizer, found)
    if compares:
        model = load_pair(source, reference, torch_dtype(dtype), impl, device=device, weights=weights, kv=kv)
    else:
        model = load_model(source, torch_dtype(dtype), impl, text.head, base=base, device=device, weights=weights, kv=kv)
    text.limit(model.config.max_positions, model.config.vocab)
    return model, text


def load_verifier(
    source: str | Path,
    family: str | Path | PrmFamily | GenerativeFamily | None = None,
    *,
    dtype: str = "bf16",
    impl: str = "auto",
    kv_bytes: int | None = None,
    reference: str | Path | None = None,
    base: str | Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    weights: str = "auto",
    kv: str = "auto",
    **fields: Any,
) -> Verifier:
    """Load a verifier on an engine of its own, to score steps that come from elsewhere.

    Args:
        source: checkpoint folder or hub id.
        family: what it reads, or writes: a name in `ttsearch.verifiers.FAMILIES` or `GENERATIVE`, a .json or .py file that
            describes one, or one as it is. None: seen in the checkpoint.
        dtype: "bf16", "fp16" or "fp32", of weights and KV. impl: "auto", "cpu" or "reference".
        kv_bytes: memory for the KV of all problems at once; None: 2 GiB. What does not fit is computed again. An eighth of it
            keeps the prompts of earlier problems, until somebody needs the pages.
        reference: of an implicit PRM, the model that it was trained from.
        base: of an adapter, or of weights without a config.json (PQM), see `load_model`; also where their tokenizer is, if
            they have none, with the family's own token added behind it.
        weights: on a CPU "auto", "float", "int16", "int8" or "calibrated"; see `load_model`.
        kv: how K and V are kept: "auto", "float", on a CPU "int16" or "int8", on a GPU "fp8"; likewise.
        device: "cpu", or "cuda" for weights and KV on a GPU.
        seed: of generative verifiers; with the problem and the steps it fixes what they write.
        fields: of the family, to be set otherwise, such as samples=4 or max_length=2048.
    """
    found = detect_family(resolve(source, torch_dtype(dtype)), family, source)
    found = get_family(found, **fields)
    kv_bytes = DEFAULT_KV_BYTES if kv_bytes is None else kv_bytes
    if kv_bytes < 1:
        raise ValueError(f"kv_bytes must be >= 1, or None for 2 GiB, got {kv_bytes}")
    if isinstance(found, GenerativeFamily):
        from .generative import GenerativeVerifier

        if reference is not None or base is not None:
            name, value = ("reference", reference) if reference is not None else ("base", base)
            raise ValueError(f"{name} must be None for generative family {found.name!r}, got {value}")
        return GenerativeVerifier.load(
            source, found, dtype=torch_dtype(dtype), impl=impl, kv_bytes=kv_bytes, seed=seed, device=device,
            weights=weights, kv=kv,
        )
    model, text = read_verifier(source, found, dtype, impl, reference, base, device, weights, kv)
    engine = Engine(None, model, kv_bytes=kv_bytes, prompt_bytes=kv_bytes // PROMPT_SHARE)
    return EngineVerifier(engine, text, True, source, (dtype, weights, kv, place(reference), place(base)))
