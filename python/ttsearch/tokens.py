"""The bytes each token id stands for, so that text can be matched exactly across token borders."""

from __future__ import annotations

import json

_SPIECE_SPACE = "\u2581"


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: character -> byte."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in kept]
    return {chr(b): b for b in kept} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    if all(char in _BYTE_OF for char in token):
        return bytes(_BYTE_OF[char] for char in token)
    return token.encode()


def _sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(_SPIECE_SPACE, " ").encode()


def _decoder_kinds(decoder: dict | None) -> set[str]:
    if decoder is None:
        return {"None"}
    if decoder["type"] == "Sequence":
        return set().union(*(_decoder_kinds(part) for part in decoder["decoders"]))
    return {decoder["type"]}


def _convert(tokenizer):
    """How this tokenizer's token strings become bytes, read from its decoder."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        if hasattr(tokenizer, "sp_model"):
            return _sentencepiece
        raise ValueError(
            f"{type(tokenizer).__name__} has no fast backend; load it with AutoTokenizer, use_fast=True"
        )
    kinds = _decoder_kinds(json.loads(backend.decoder.__getstate__()) if backend.decoder else None)
    if "ByteLevel" in kinds:
        return _byte_level
    if kinds & {"ByteFallback", "Metaspace", "Replace"}:
        return _sentencepiece
    if kinds <= {"None", "Fuse", "Strip"}:
        return str.encode
    raise ValueError(
        f"stop strings need a tokenizer whose tokens join without a rule; its decoder is {sorted(kinds)}, "
        "known are ByteLevel, Metaspace, ByteFallback, Replace, Fuse"
    )


def token_bytes(tokenizer, vocab_size: int | None = None) -> list[bytes]:
    """Bytes of every id in `range(vocab_size)`; empty for special tokens and for ids without a token.

    `vocab_size` is the model's (often padded) vocabulary; left out, the tokenizer's own size.
    """
    convert = _convert(tokenizer)
    added = tokenizer.added_tokens_decoder
    size = max(len(tokenizer), max(added, default=-1) + 1)
    table = [b""] * size
    for token, i in tokenizer.get_vocab().items():
        if i not in added:
            table[i] = convert(token)
    for i, token in added.items():
        table[i] = b"" if token.special else token.content.encode()
    if vocab_size is None or vocab_size == size:
        return table
    return (table + [b""] * (vocab_size - size))[:vocab_size]
