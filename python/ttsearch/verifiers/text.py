"""From text to the ids a verifier reads, and the positions its scores are read at."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from ttskernels.models.heads import HeadSpec

from .family import PrmFamily
from .render import Renderer, clean


@dataclass(frozen=True)
class PrmPath:
    """What a verifier has read so far: the problem, the steps as they were given, and their ids from the very beginning."""

    problem: str
    steps: tuple[str, ...]
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Extension:
    """What to compute for new steps: drop the parent's tokens from `keep` on, append `ids`, read scores at `reads`."""

    path: PrmPath  # the path with the new steps, or with the first of them
    keep: int  # tokens of the parent's path, from its beginning, that stay valid
    ids: list[int]
    reads: list[int]  # indices into ids, ascending
    owner: list[int]  # of every read: index of its step among the new ones
    targets: list[int] | None = None  # `read="every token"`: the id behind every read; the first may be read at -1, before ids

    @property
    def length(self) -> int:
        """Tokens of the whole path."""
        return self.keep + len(self.ids)


class TextVerifier:
    """A family bound to a tokenizer.

    Args:
        tokenizer: the checkpoint's own; a fast one for families that tokenise the whole text.
        max_position: the model's limit in tokens, see `limit`.
    Raises:
        ValueError: the tokenizer is not of this family: no bos token or chat template where one is needed, a step suffix
            that is no token of its own, label tokens that it lacks or that are one and the same.
    """

    def __init__(self, tokenizer, family: PrmFamily, max_position: int | None = None):
        self.tokenizer, self.family = tokenizer, family
        self._renderer = Renderer(tokenizer, family)
        self.max_length, self._suffix_ids = family.max_length, []
        self.limit(max_position)
        if family.tokenise == "whole" and not tokenizer.is_fast:
            raise ValueError(
                f"PRM family {family.name!r} tokenises the whole text and needs character offsets, which "
                f"{type(tokenizer).__name__} does not give; pass a fast tokenizer (tokenizer.json)"
            )
        self._front = self._front_ids()
        self._suffix_ids = self._encode(family.suffix) if family.suffix else []
        self._check_ids()
        self._check_suffix()
        self._row_ids = self._answers() if family.answers else self._rows()

    @property
    def head(self) -> HeadSpec | None:
        """How `load_model` is to read the checkpoint's head; None: no head (log-probabilities are read)."""
        family = self.family
        if family.read == "every token":
            return None
        mix = self._answer_mix if family.answers else family.mix
        return HeadSpec(rows=self._row_ids, vocab_mean=family.vocab_mean, squash=family.squash, mix=mix)

    @property
    def stepwise(self) -> bool:
        """Whether an `extend` takes one step at a time, because what is read stands behind the solution so far."""
        return self.family.layout == "question" or self.family.read == "every token"

    def start(self, problem: str) -> PrmPath:
        """Ids before the first step."""
        problem = clean(problem).strip() if self.family.strip_problem else clean(problem)
        if self.family.read == "every token":
            return PrmPath(problem, (), tuple(self._turn(problem, [])[:-1]))
        opening = self._renderer.opening(problem)
        if self.family.tokenise == "whole":
            opening = opening.rstrip(" ")  # a space would become part of the first step's first token
        return PrmPath(problem, (), (*self._front, *self._encode(opening)))

    def extend(self, path: PrmPath, steps: Sequence[str]) -> Extension:
        """Ids and read positions of `steps` behind `path`.

        A step's own delimiter and outer white space are removed: the family's suffix takes its place. It has one read, or
        one per line with `lines="each"` (the step's score is then the smallest), or with `read="every token"` one for each
        new token of the assistant's turn, its end included, where that token is predicted. A step without visible text
        gives no id and no read: it has no score, and path scores pass over it. Reads come from where steps stand in the
        text, never from the ids: a marker within the problem or a step is text like any other.

        Families that tokenise step by step keep all of the path. The others tokenise the whole text anew and keep the
        longest common beginning; a token read now is always among `ids`, even where the parent had it. Where the token at a
        step's end would hold text of the next step too, the extension ends with that step: `path` says how many it has.

        Raises:
            ValueError: no steps.
        """
        if isinstance(steps, str) or not steps:
            raise ValueError(f"steps must be a sequence of at least one step, got {steps!r}")
        before = [piece for step in path.steps for piece in self._renderer.pieces(step)]
        pieces = [(piece, i) for i, step in enumerate(steps) for piece in self._renderer.pieces(step)]
        all_steps = (*path.steps, *steps)
        if not pieces:
            return Extension(PrmPath(path.problem, all_steps, path.ids), len(path.ids), [], [], [])
        if self.family.read == "every token":
            return self._every_token(path, all_steps, before + [piece for piece, _ in pieces])
        owner = [i for _, i in pieces]
        if self.family.tokenise == "step":
            ids, reads = self._append(path, len(before), [piece for piece, _ in pieces])
            keep = len(path.ids)
        else:
            text, ends = self._renderer.text(path.problem, before + [piece for piece, _ in pieces], len(before))
            encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids, offsets = [*self._front, *encoding["input_ids"]], encoding["offset_mapping"]
            keep = common(path.ids, ids)
            starts = [start for start, _ in offsets]
            lasts = [bisect_left(starts, end) - 1 for end in ends]  # tokens that end the pieces
            owner = owner[-len(lasts) :]
            for last, end, i, following in zip(lasts, ends, owner, owner[1:], strict=False):
                if i != following and offsets[last][1] > end:
                    return self.extend(path, steps[: i + 1])
            reads = [last + len(self._front) + self.family.read_offset for last in lasts]
        keep = min(keep, *reads) if reads else keep
        new = PrmPath(path.problem, all_steps, tuple(ids))
        return Extension(new, keep, ids[keep:], [read - keep for read in reads], owner)

    def limit(self, max_position: int | None, vocab: int | None = None) -> None:
        """Take the model's limits into account, once they are known: the smaller of its length and the family's holds.

        Raises:
            ValueError: the step suffix has an id that the model's vocabulary does not have.
        """
        self.max_length = min((length for length in (self.max_length, max_position) if length), default=None)
        if vocab is not None and self._suffix_ids and max(self._suffix_ids) >= vocab:
            self._wrong(f"ends a step with {self.family.suffix!r}, ids {self._suffix_ids}; the checkpoint embeds {vocab} tokens")

    def fits(self, num_ids: int) -> bool:
        """Whether so many ids are within what the verifier was trained for; never cut it silently."""
        return self.max_length is None or num_ids <= self.max_length

    def _append(self, path: PrmPath, count: int, pieces: list[str]) -> tuple[list[int], list[int]]:
        ids, reads = list(path.ids), []
        for number, piece in enumerate(pieces, count + 1):
            if self.family.between and number > 1:
                ids += self._encode(self.family.between)
            ids += self._encode(self._renderer.written(piece, number)) + self._suffix_ids
            reads.append(len(ids) - 1 + self.family.read_offset)
        return ids, reads

    def _every_token(self, path: PrmPath, steps: tuple[str, ...], pieces: list[str]) -> Extension:
        """The path holds the turn without its end, which the next step may move."""
        ids = self._turn(path.problem, pieces)
        chain = ids[:-1]
        keep = min(common(path.ids, chain), len(chain) - 1)
        first = max(keep, len(self.start(path.problem).ids))
        reads = [i - 1 - keep for i in range(first, len(ids))]
        new = PrmPath(path.problem, steps, tuple(chain))
        return Extension(new, keep, chain[keep:], reads, [len(steps) - len(path.steps) - 1] * len(reads), ids[first:])

    def _turn(self, problem: str, pieces: list[str]) -> list[int]:
        return [*self._front, *self._encode(self._renderer.turn(problem, pieces))]

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _front_ids(self) -> list[int]:
        rule, bos = self.family.bos, self.tokenizer.bos_token_id
        if rule == "tokenizer":
            bare, full = self._encode("x"), list(self.tokenizer("x")["input_ids"])
            return next((full[:i] for i in range(len(full)) if full[i : i + len(bare)] == bare), [])
        if rule == "required" and bos is None:
            self._wrong("begins its text with the tokenizer's bos_token, which is None here")
        return [bos] if rule in ("required", "if any") and bos is not None else []

    def _check_suffix(self) -> None:
        suffix, unknown = self.family.suffix, self.tokenizer.unk_token_id
        if not suffix:
            return
        if unknown is not None and unknown in self._suffix_ids:
            self._wrong(f"ends a step with {suffix!r}, which this tokenizer has no token for")
        wanted, marker = self.family.suffix_tokens, suffix.strip() or suffix
        if wanted is None:
            return
        spans = [(0, 1)] * len(self._suffix_ids)
        if self.family.tokenise == "whole":  # after other text; it must not become part of that text's last token
            at = 1 + suffix.index(marker)
            spans = self.tokenizer("." + suffix, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            spans = [span for span in spans if span[0] < at + len(marker) and span[1] > at]
            spans = [] if spans[0][0] == 0 else spans
        if len(spans) != wanted:
            self._wrong(f"needs {marker!r} to be {wanted} token{'s' * (wanted > 1)} of its own, which it is not here")

    def _check_ids(self) -> None:
        """Where the vocabulary is the real one, its ids must be the published ones."""
        if self.family.vocab is None or self.tokenizer.vocab_size != self.family.vocab:
            return
        for text, published in self.family.ids.items():
            got = self._encode(text)[-1]
            if got != published:
                self._wrong(f"has {text!r} as token {published}, here it is {got}")

    def _rows(self) -> tuple[int, ...]:
        encoded = [self._encode(row) for row in self.family.rows]
        ids = tuple(row[-1] if row else None for row in encoded)
        if None in ids or self.tokenizer.unk_token_id in ids or len(set(ids)) != len(ids):
            self._wrong(f"scores by the logits of {self.family.rows}, which are tokens {ids} here and must be distinct")
        return ids

    def _answers(self) -> tuple[int, ...]:
        """Ids of every spelling that the tokenizer makes one token of, when it stands alone."""
        unknown = self.tokenizer.unk_token_id
        sides = []
        for spellings in self.family.answers:
            encoded = [self._encode(text) for text in spellings]
            sides.append(list(dict.fromkeys(ids[0] for ids in encoded if len(ids) == 1 and ids[0] != unknown)))
        yes, no = sides
        if not yes or not no or set(yes) & set(no):
            self._wrong(f"needs tokens of their own for {self.family.answers}, which are {yes} and {no} here")
        self._answer_mix = (1.0,) * len(yes) + (0.0,) * len(no)
        return (*yes, *no)

    def _wrong(self, what: str) -> None:
        raise ValueError(
            f"PRM family {self.family.name!r} {what}; load the tokenizer from the PRM's own checkpoint, or name its family"
        )


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
