"""Where a step and a solution end, compiled to one integer table over tokens.

The engine keeps one integer per branch and does `state = next_state[state, token]`: exact across token
borders, no text below the line. A step ends at `\\n\\n`, once it has any visible text; a box still open is
then given up, as LaTeX does. A solution ends when a `\\boxed{...}` closes, or at an end-of-text id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .answers import BOX
from .tokens import token_bytes

STEP_ENDED, SOLUTION_ENDED = -1, -2
MAX_DEPTH = 8  # braces open at once inside a box; a deeper box is not recognised
_SPACE = b" \t\n\r\v\f"
_BOX = BOX.encode()


@dataclass(frozen=True)
class _State:
    """What matters of a step's bytes so far."""

    visible: bool = False  # any byte that is not white space
    tail: bytes = b""  # the longest end of the text that begins a delimiter
    box: bytes = b""  # the same for `\boxed{`
    depth: int = 0  # open braces inside a box
    escaped: bool = False  # inside a box, just behind a backslash
    ended: bool = False  # a delimiter was seen in this very token


def _longest_prefix(text: bytes, patterns: Sequence[bytes]) -> bytes:
    """The longest end of `text` that is a proper beginning of a pattern."""
    for start in range(len(text)):
        if any(len(text) - start < len(p) and p.startswith(text[start:]) for p in patterns):
            return text[start:]
    return b""


def _advance(state: _State, byte: int, delimiters: Sequence[bytes], opening: bytes) -> _State | None:
    """The state after one more byte; None: the solution ended."""
    char = bytes([byte])
    visible, tail = state.visible or char not in _SPACE, state.tail + char
    if visible and any(tail.endswith(d) for d in delimiters):
        return _State(True, ended=True)
    tail = b"" if state.ended else _longest_prefix(tail, delimiters)
    if not state.depth:
        box = state.box + char
        if box == opening:
            return _State(True, tail, depth=1, ended=state.ended)
        return _State(visible, tail, _longest_prefix(box, [opening]), ended=state.ended)
    if state.escaped:
        return _State(True, tail, depth=state.depth, ended=state.ended)
    depth = state.depth + (char == b"{") - (char == b"}")
    if depth == 0:
        return None
    if depth > MAX_DEPTH:
        return _State(True, tail, ended=state.ended)
    return _State(True, tail, depth=depth, escaped=char == b"\\", ended=state.ended)


def _byte_automaton(delimiters: Sequence[bytes], opening: bytes) -> tuple[np.ndarray, np.ndarray, int]:
    """Transitions `[states + 1, classes]` (the last state: solution ended), class of each byte, states that
    start a token.

    States that have already seen a delimiter come after the others: they exist only inside a token.
    """
    braces = b"{}\\" if opening else b""
    special = sorted(set(b"".join(delimiters) + opening + braces + _SPACE))
    class_of = np.zeros(256, np.uint8)
    class_of[special] = np.arange(1, len(special) + 1)
    samples = [next(b for b in range(256) if b not in special), *special]
    edges: dict[_State, list[_State | None]] = {}
    todo = [_State()]
    while todo:
        state = todo.pop()
        if state not in edges:
            edges[state] = [_advance(state, byte, delimiters, opening) for byte in samples]
            todo += [s for s in edges[state] if s is not None]
    live = sorted((s for s in edges if not s.ended), key=lambda s: (s != _State(), repr(s)))
    order = live + sorted((s for s in edges if s.ended), key=repr)
    number = {state: i for i, state in enumerate(order)} | {None: len(order)}
    table = np.array([[number[s] for s in edges[state]] for state in order] + [[len(order)] * len(samples)])
    return table.astype(np.int16), class_of, len(live)


def build_table(
    vocabulary: Sequence[bytes],
    eos_ids: Iterable[int],
    delimiters: Sequence[str] = ("\n\n",),
    boxes: bool = True,
) -> np.ndarray:
    """`next_state [states, vocab]` int32 for tokens given as bytes; row 0 is the start.

    A token that completes a delimiter ends the step even if more text follows in it (-1); one that closes a
    box, before or after such a delimiter, or is an end-of-text id, ends the solution (-2). With `boxes` False a
    box is text like any other.

    Raises:
        ValueError: an empty delimiter, or an end-of-text id outside the vocabulary.
    """
    if not delimiters or not all(delimiters):
        raise ValueError(f"delimiters must be non-empty strings, got {delimiters!r}")
    edges, class_of, num_live = _byte_automaton([d.encode() for d in delimiters], _BOX if boxes else b"")
    translation = class_of.tobytes()
    spelled = [token.translate(translation) for token in vocabulary]
    distinct = sorted(set(spelled), key=len, reverse=True)  # most tokens look alike to the automaton
    lengths = np.array([len(token) for token in distinct])
    symbols = np.zeros((len(distinct), max(int(lengths.max(initial=0)), 1)), np.uint8)
    for i, token in enumerate(distinct):
        symbols[i, : len(token)] = np.frombuffer(token, np.uint8)
    state = np.repeat(np.arange(num_live, dtype=np.int16)[:, None], len(distinct), axis=1)
    for position in range(symbols.shape[1]):
        longer = int((lengths > position).sum())  # a prefix: sorted by length
        state[:, :longer] = edges[state[:, :longer], symbols[:longer, position]]
    result = state.astype(np.int32)
    result[state >= num_live] = STEP_ENDED
    result[state == len(edges) - 1] = SOLUTION_ENDED
    index = {token: i for i, token in enumerate(distinct)}
    table = result[:, np.fromiter((index[token] for token in spelled), np.int64, len(spelled))]
    for i in eos_ids:
        if not 0 <= i < len(vocabulary):
            raise ValueError(
                f"eos_ids must lie in [0, {len(vocabulary)}), got {i}; check the model's vocab_size"
            )
        table[:, i] = SOLUTION_ENDED
    return np.ascontiguousarray(table)


_CACHE: dict[str, np.ndarray] = {}


def compile_stops(
    tokenizer,
    eos_ids: Iterable[int],
    vocab_size: int | None = None,
    delimiters: Sequence[str] = ("\n\n",),
    boxes: bool = True,
) -> np.ndarray:
    """`build_table` for a tokenizer; built once per vocabulary and process. Do not modify the result."""
    vocabulary, eos_ids = token_bytes(tokenizer, vocab_size), sorted(set(eos_ids))
    digest = hashlib.blake2b(repr((eos_ids, tuple(delimiters), boxes)).encode())
    digest.update(b"".join(len(token).to_bytes(4, "little") + token for token in vocabulary))
    key = digest.hexdigest()
    if key not in _CACHE:
        _CACHE[key] = build_table(vocabulary, eos_ids, delimiters, boxes)
        _CACHE[key].setflags(write=False)
    return _CACHE[key]
