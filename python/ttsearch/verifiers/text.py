"""From text to the ids a verifier reads, and the positions its scores are read at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .families import PrmFamily


@dataclass(frozen=True)
class PrmPath:
    """What a verifier has read so far."""

    problem: str
    steps: tuple[str, ...]
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Extension:
    """What to compute for new steps: drop the parent's tokens from `keep` on, append `ids`, read scores at `reads`."""

    path: PrmPath
    keep: int
    ids: list[int]
    reads: list[int]
    owner: list[int]  # of every read: index of its step among the new ones

    @property
    def length(self) -> int:
        """Tokens of the whole path."""
        return self.keep + len(self.ids)


class TextVerifier:
    """A family bound to a tokenizer. Step ids are appended to a cached prefix; nothing before changes."""

    def __init__(self, tokenizer, family: PrmFamily, max_position: int | None = None):
        self.tokenizer, self.family = tokenizer, family
        lengths = [length for length in (family.max_length, max_position) if length]
        self.max_length = min(lengths) if lengths else None
        bos = tokenizer.bos_token
        if family.bos == "required" and bos is None:
            raise ValueError(
                f"PRM family {family.name!r} begins its prompt with the tokenizer's bos_token, "
                "which is None here; load the tokenizer from the PRM's own checkpoint"
            )
        self._bos = bos if bos is not None and family.bos != "never" else ""
        self._suffix_ids = self._encode(family.suffix)
        self._read_back = len(self._suffix_ids) - 1 + family.read_offset
        unknown = tokenizer.unk_token_id
        if not self._suffix_ids or (unknown is not None and unknown in self._suffix_ids):
            raise ValueError(
                f"the tokenizer has no token for the step suffix {family.suffix!r} of PRM family "
                f"{family.name!r}; this verifier is of another family"
            )

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def prompt_ids(self, problem: str) -> list[int]:
        """Ids before the first step, tokenised as one string."""
        return self._encode(self.family.prompt.format(problem=problem, bos=self._bos))

    def step_ids(self, step_text: str) -> tuple[list[int], list[int]]:
        """Ids to append for a step, and the read positions among them.

        The step's own delimiter and outer white space are removed: the family's suffix takes its place. There
        is one position, or one per line with `lines="each"` (the step's score is then the smallest). A step
        without visible text gives nothing to append and no position: it has no score, and path scores pass
        over it.
        """
        text = step_text.strip()
        if not text:
            return [], []
        if self.family.lines == "keep":
            pieces = [text]
        else:
            pieces = [line.strip() for line in text.split("\n") if line.strip()]
            pieces = [" ".join(pieces)] if self.family.lines == "join" else pieces
        ids: list[int] = []
        reads = []
        for piece in pieces:
            ids += self._encode(piece)
            reads.append(len(ids) + self._read_back)
            ids += self._suffix_ids
        return ids, reads

    stepwise = False

    def start(self, problem: str) -> PrmPath:
        """Ids before the first step."""
        return PrmPath(problem, (), tuple(self.prompt_ids(problem)))

    def extend(self, path: PrmPath, steps: Sequence[str]) -> Extension:
        """Ids and read positions of `steps` behind `path`."""
        if isinstance(steps, str) or not steps:
            raise ValueError(f"steps must be a sequence of at least one step, got {steps!r}")
        ids: list[int] = []
        reads: list[int] = []
        owner: list[int] = []
        for index, step in enumerate(steps):
            step_ids, step_reads = self.step_ids(step)
            reads += [len(ids) + read for read in step_reads]
            owner += [index] * len(step_reads)
            ids += step_ids
        new = PrmPath(path.problem, (*path.steps, *steps), (*path.ids, *ids))
        return Extension(new, len(path.ids), ids, reads, owner)

    def limit(self, max_position: int | None) -> None:
        """Take the model's limit into account: the smaller of it and the family's holds."""
        self.max_length = min((length for length in (self.max_length, max_position) if length), default=None)

    def fits(self, num_ids: int) -> bool:
        """Whether so many ids are within what the verifier was trained for; never cut it silently."""
        return self.max_length is None or num_ids <= self.max_length
