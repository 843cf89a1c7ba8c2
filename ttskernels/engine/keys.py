"""Sampling keys: a pure function of seed, problem and the child ordinals from the root; never of arrival order."""

from __future__ import annotations

import hashlib

_MASK = (1 << 64) - 1


def root_key(seed: int, problem: str) -> int:
    """64-bit key of a problem's root."""
    digest = hashlib.blake2b(f"{seed}\0{problem}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def child_key(parent: int, ordinal: int) -> int:
    """Key of child `ordinal` (0, 1, ...) of the node with key `parent`: one round of splitmix64."""
    z = (parent + (ordinal + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def as_int64(key: int) -> int:
    """The same 64 bits as a signed integer, as torch.int64 holds them."""
    return key - (1 << 64) if key >> 63 else key
