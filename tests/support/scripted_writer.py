"""A writer without a model: what it writes and how it judges comes from a script, and every release is checked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from ttsearch.verifiers.writer import Chain, Draft, Thread


class ChatTokenizer:
    """Just a chat template."""

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return "".join(f"<{m['role']}>{m['content']}</{m['role']}>" for m in messages) + "<assistant>"


class ScriptedWriter:
    """Tokens are characters. `script(text, i)` continues `text` (sample i of one call); it ends by itself, or is cut at
    the draft's stops or its room. `odds(text)`: log-odds of the choice behind `text`.
    """

    def __init__(self, script: Callable[[str, int], str], odds: Callable[[str], float], limit: int = 10**6):
        self.script, self.odds, self.limit = script, odds, limit
        self.begun: list[tuple[str, int]] = []  # texts, and how much of each was shared
        self.written: list[tuple[int, int]] = []  # (key, sample)
        self.held: dict[int, object] = {}

    def _hold(self, thing):
        self.held[id(thing)] = thing
        return thing

    async def begin(self, text, stable, above):
        if len(text) >= self.limit:
            return None
        self.begun.append((text, len(above.ids) if above and text.startswith("".join(above.ids)) else 0))
        return self._hold(Chain((), tuple(text[:stable]))), self._hold(Thread(None, tuple(text), added=len(text)))

    async def append(self, thread, text):
        return self._hold(Thread(None, (*thread.ids, *thread.pending, *text), added=len(text)))

    async def write(self, thread, n, key, stops, max_tokens, include=False):
        async def draft(i):
            await asyncio.sleep(0.001 * (n - i))  # later samples end first
            before = "".join(thread.ids) + thread.pending
            text, stop = self.script(before, i), ""
            found = min(((text.find(s), s) for s in stops if s in text), default=None)
            if found:
                at, stop = found
                text = text[: at + len(stop) * include]
            if len(text) > max_tokens:
                text, stop = text[:max_tokens], None
            self.written.append((key, i))
            return Draft(self._hold(Thread(None, (*before, *text), added=len(text))), len(before), text, stop)

        return [asyncio.ensure_future(draft(i)) for i in range(n)]

    async def log_odds(self, thread, text):
        return self.odds("".join(thread.ids) + thread.pending + text)

    def cut(self, draft, at):
        return replace(draft.thread, ids=draft.thread.ids[: draft.start + at])

    def retain(self, held):
        raise AssertionError("not here")

    def release(self, *held):
        for thing in held:
            del self.held[id(thing)]
