"""Text written by a model on our engine: prompts that share their beginnings, drafts that stop at a text, choices read.

One model is policy and scorer over one forest: drafts decode as branches below their prompt, and the choice behind a
draft is read from the same KV. Nothing here knows what the text is about.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ttskernels.engine.batcher import Engine
from ttskernels.engine.work import Sampling, Session, StepEnd

from .spelling import Spelling
from .text import common


@dataclass(frozen=True)
class Chain:
    """Prompt tokens that later prompts may share: forest nodes, each with the number of tokens it ends at."""

    nodes: tuple[tuple[Any, int], ...]
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Thread:
    """A text being written: the first `len(ids)` tokens of the chain that ends in `node`, then `pending`.

    `pending` is not tokens yet: a stop text may begin or end inside a token. `added`: tokens that this thread was made of.
    """

    node: Any
    ids: tuple[int, ...]
    pending: str = ""
    added: int = 0


@dataclass(frozen=True)
class Draft:
    """What was written behind token `start`. `stop` is the text it stopped at, "" an end-of-text token, None: neither.

    `text` has bytes that are no UTF-8 as surrogates (`clean` removes them), so that positions in it are exact.
    """

    thread: Thread
    start: int
    text: str
    stop: str | None


class Writer(Protocol):
    """What a generative family asks of a model, for one problem. `TokenWriter` runs one; the tests' follows a script.

    Chains and threads that are returned hold KV until `release`; those handed in are not used up. `limit`: tokens of
    the longest text, the last one written included.
    """

    limit: int

    async def begin(self, text: str, stable: int, above: Chain | None) -> tuple[Chain, Thread] | None:
        """Start a text. `stable`: so many of its characters begin a later text, too, whose `above` the chain is.

        Returns None if the model allows no token behind it.
        """
        ...

    async def write(
        self, thread: Thread, n: int, key: int, stops: Sequence[str], max_tokens: int, include: bool = False
    ) -> list[asyncio.Task[Draft]]:
        """`n` drafts of at most `max_tokens` tokens, each until one of `stops` is in it (with `include`, it stays).

        Draft i samples with the i-th child of `key`; its thread is to be released.
        """
        ...

    async def append(self, thread: Thread, text: str) -> Thread:
        """A new thread with `text` behind this one."""
        ...

    async def log_odds(self, thread: Thread, text: str) -> float:
        """log P(yes) - log P(no) of the family's two choices behind the thread and `text`.

        Raises:
            Unreadable: a choice is not one token there, or the text too long for the model.
        """
        ...

    def cut(self, draft: Draft, at: int) -> Thread:
        """The draft's thread up to character `at` of its text; it holds nothing that is to be released."""
        ...

    def retain(self, held: Chain | Thread) -> None:
        """One more `release` to come."""
        ...

    def release(self, *held: Chain | Thread) -> None: ...


class Unreadable(Exception):
    """The odds of a choice cannot be read behind a draft; the message is the reason, in the words that are counted."""


class TokenWriter:
    """See `Writer`. The engine's policy and verifier are one model, whose head reads log P(yes) - log P(no).

    Args:
        choices: the two texts; rows: their ids, those of the head.
        ends: end-of-text ids ("") and special tokens that are stop texts, which bytes do not show.
    """

    def __init__(
        self,
        engine: Engine,
        spelling: Spelling,
        choices: tuple[str, str],
        rows: tuple[int, int],
        ends: dict[int, str],
        sampling: Sampling,
    ):
        self.engine, self.spelling, self.sampling = engine, spelling, sampling
        self.choices, self.rows, self.ends = choices, rows, ends
        self.limit = engine.policy_model.config.max_positions
        self.session: Session | None = None

    def open(self, text: str, stable: int, max_tokens: int) -> Chain:
        """Start the session with what every prompt of the problem begins with."""
        ids = tuple(self.spelling.encode(text))
        shared = max(1, common(self.spelling.encode(text[:stable]), ids) - 1)
        self.session = self.engine.open(list(ids[:shared]), max_new_tokens=len(ids) - shared + max_tokens)
        return Chain(((self.session.root, shared),), ids[:shared])

    async def begin(self, text: str, stable: int, above: Chain | None) -> tuple[Chain, Thread] | None:
        ids = tuple(self.spelling.encode(text))
        if len(ids) >= self.limit:
            return None
        same = common(above.ids, ids) if above else 0
        nodes = [(node, end) for node, end in above.nodes if end <= same] if above else []
        node, at = nodes[-1] if nodes else (None, 0)
        kept = at
        shared = common(self.spelling.encode(text[:stable]), ids) - 1  # its last token may merge with what follows
        if at < shared:
            node, at = await self._extend(node, ids[at:shared]), shared
            nodes.append((node, at))
        elif node is not None:
            self.engine.retain(node)
        tail = await self._extend(node, ids[at:])
        return Chain(tuple(nodes), ids[:at]), Thread(tail, ids, added=len(ids) - kept)

    async def append(self, thread: Thread, text: str) -> Thread:
        ids = tuple(self.spelling.encode(thread.pending + text))
        node = await self._extend(thread.node, ids, keep=len(thread.ids))
        return Thread(node, (*thread.ids, *ids), added=len(ids))

    async def write(
        self, thread: Thread, n: int, key: int, stops: Sequence[str], max_tokens: int, include: bool = False
    ) -> list[asyncio.Task[Draft]]:
        whole = thread
        if thread.pending or thread.node.pos0 + len(thread.node.ids) > len(thread.ids):
            whole = await self.append(thread, "")
        drafts = [_Drafting(self, whole.ids, stops, max_tokens, include) for _ in range(n)]
        if max_tokens > 0 and len(whole.ids) < self.limit:
            self.decode(whole.node, key, drafts)
        else:
            for draft in drafts:
                self.engine.retain(whole.node)
                draft.events.put_nowait(StepEnd(whole.node, (), "length", 0.0, key))
        if whole is not thread:
            self.release(whole)
        return [asyncio.ensure_future(draft.run()) for draft in drafts]

    async def log_odds(self, thread: Thread, text: str) -> float:
        keep = len(thread.ids)
        try:
            ids, rows = self.spelling.question(thread.pending + text, self.choices)
        except ValueError:
            rows = None
        if rows != self.rows:
            raise Unreadable("choices not one token")
        if keep + len(ids) > self.limit:
            raise Unreadable("too long")
        if not ids:  # the choice comes at once: the last token is read again
            keep, ids = keep - 1, [thread.ids[-1]]
        node, scores = await asyncio.wrap_future(
            self.engine.score(self.session, thread.node, ids, [len(ids) - 1], keep=keep)
        )
        self.engine.release(self.session, verifier=[node])
        return scores[0]

    def cut(self, draft: Draft, at: int) -> Thread:
        size = len(draft.text[:at].encode("utf-8", "surrogateescape"))
        count, pending = self.spelling.cut(draft.thread.ids[draft.start :], size)
        return replace(draft.thread, ids=draft.thread.ids[: draft.start + count], pending=pending)

    def retain(self, held: Chain | Thread) -> None:
        for node in _ends([held]):
            self.engine.retain(node)

    def release(self, *held: Chain | Thread) -> None:
        self.engine.release(self.session, policy=_ends(held))

    def close(self) -> None:
        self.engine.close(self.session)

    async def _extend(self, node: Any, ids: Sequence[int], keep: int | None = None) -> Any:
        return await asyncio.wrap_future(self.engine.extend(self.session, node, list(ids), keep))

    def decode(self, node: Any, key: int, drafts: list[_Drafting]) -> None:
        """One branch below `node` for each draft, until the next text that any draft of the engine may stop at."""
        loop = asyncio.get_running_loop()

        def on_step(ordinal: int, end: StepEnd | BaseException) -> None:
            try:
                loop.call_soon_threadsafe(drafts[ordinal].events.put_nowait, end)
            except RuntimeError:  # the caller's loop is gone; its session is about to be closed
                return

        self.engine.branch(
            self.session, node, key=key, ordinals=range(len(drafts)), path_key=(), sampling=self.sampling,
            max_step_tokens=drafts[0].room, max_length=self.limit, group=drafts[0].group, on_step=on_step,
        )  # fmt: skip


class _Drafting:
    """One draft while it is written, through the pauses that are not its own."""

    def __init__(self, writer: TokenWriter, before: tuple[int, ...], stops: Sequence[str], room: int, include: bool):
        self.writer, self.before, self.room, self.include = writer, before, room, include
        self.stops = {stop: stop.encode() for stop in stops}
        self.ids: list[int] = []
        self.events: asyncio.Queue[StepEnd | BaseException] = asyncio.Queue()
        self.group = object()

    async def run(self) -> Draft:
        writer = self.writer
        while True:
            try:
                end = await self.events.get()
            except asyncio.CancelledError:
                writer.engine.cancel(self.group)
                raise
            if isinstance(end, BaseException):
                raise end
            self.ids += end.ids
            self.room -= len(end.ids)
            draft = self._draft(end)
            if draft is not None:
                return draft
            writer.decode(end.node, end.key, [self])
            writer.engine.release(writer.session, policy=[end.node])

    def _draft(self, end: StepEnd) -> Draft | None:
        """What is written if it ends here."""
        data = self.writer.spelling.spell(self.ids)
        found = [(data.find(stop), len(stop), text) for text, stop in self.stops.items() if stop in data]
        kept, pending, stop = len(self.ids), "", None
        if found:
            at, size, stop = min(found)
            data = data[: at + size * self.include]
            kept, pending = self.writer.spelling.cut(self.ids, len(data))
        elif end.reason == "end":
            stop = self.writer.ends.get(self.ids[-1], "")
            stop = stop if stop in self.stops else ""
            kept -= not (self.include and stop)
        elif end.reason == "step" and self.room > 0:
            return None
        thread = Thread(end.node, (*self.before, *self.ids[:kept]), pending, len(self.ids))
        return Draft(thread, len(self.before), data.decode("utf-8", "surrogateescape"), stop)


def _ends(held: Iterable[Chain | Thread]) -> list[Any]:
    """The nodes whose handles are held."""
    return [h.node if isinstance(h, Thread) else h.nodes[-1][0] for h in held if isinstance(h, Thread) or h.nodes]
