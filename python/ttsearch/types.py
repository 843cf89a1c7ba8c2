"""What every layer of ttsearch exchanges: problems, search nodes, costs, results. Plain data."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .budget import Budget

FinishReason = Literal["eos", "boxed", "length", "step", "refused"]


@dataclass(frozen=True)
class Problem:
    """One question. `id` seeds the sampling; left out, it is a hash of the prompt."""

    prompt: str
    answer: str | None = None
    id: str = ""
    level: int | str | None = None

    def __post_init__(self):
        if not isinstance(self.prompt, str) or not self.prompt:
            raise ValueError(f"prompt must be a non-empty str, got {self.prompt!r}")
        for name in ("answer", "id"):
            value = getattr(self, name)
            if not isinstance(value, str) and (name, value) != ("answer", None):
                raise ValueError(f"{name} must be a str, got {value!r}; pass str(...)")
        for name in ("prompt", "id"):
            try:
                getattr(self, name).encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{name} must be text that is UTF-8, got {getattr(self, name)!r} ({error.reason})") from None
        if not self.id:
            object.__setattr__(self, "id", hashlib.sha256(self.prompt.encode()).hexdigest()[:16])


@dataclass(frozen=True)
class PathScores:
    """What a path scores by each rule, over its steps so far; NaN without a scored step."""

    count: int
    min: float
    last: float
    mean: float
    product: float  # NaN if a score is negative
    log_product: float
    bounded: bool  # every score is in [0, 1], as products need


@dataclass(frozen=True)
class Scored:
    """What a verifier says of new steps behind a chain."""

    handle: Any  # of the chain with the new steps, to be released once; None if it was refused
    scores: list[float | None]  # one a step; None: it has no visible text, was refused, or failed
    refused: str | None = None  # why the verifier cannot take this path, for example its length
    running: PathScores | None = None  # of the whole path; None: not kept
    computed: int = 0  # tokens read, or written, for these steps
    kept: int = 0  # tokens of the chain that stayed in front of them
    failed: str | None = None  # why a step with text has no score although the chain goes on


@dataclass(eq=False)
class SearchNode:
    """One reasoning step in the tree of partial solutions; the root holds the prompt and no step.

    Text, scores and the tree stay after a release: only the engine's `handle` (its KV) goes away.
    """

    parent: SearchNode | None = field(default=None, repr=False)
    path_key: tuple[int, ...] = ()  # child ordinals from the root
    text: str = ""  # of this step alone, its delimiter included as generated
    num_tokens: int = 0  # of this step; of the prompt for the root
    step_score: float | None = None  # None: not scored
    finished: bool = False  # nothing may be added below
    finish_reason: FinishReason | None = None
    logprob: float = 0.0  # sum over this step's tokens
    handle: Any = field(default=None, repr=False)
    children: list[SearchNode] = field(default_factory=list, repr=False)
    released: bool = False
    pruned: bool = False  # dropped by the strategy, as opposed to released at the end
    running: PathScores | None = field(default=None, repr=False)  # of the path down to here, if the verifier keeps them

    def path(self) -> list[SearchNode]:
        """The steps from the first one to this one; the root is not a step."""
        steps, node = [], self
        while node.parent is not None:
            steps.append(node)
            node = node.parent
        return steps[::-1]

    def path_text(self) -> str:
        return "".join(step.text for step in self.path())

    def step_scores(self) -> list[float | None]:
        """Scores of the path's steps; a step without visible text (end of text at once) is left out."""
        return [step.step_score for step in self.path() if step.text.strip()]

    def path_tokens(self) -> int:
        """Generated tokens on the path; the prompt is not counted."""
        return sum(step.num_tokens for step in self.path())

    @property
    def solved(self) -> bool:
        """Ended by itself (end of text or a boxed answer): only such a path may vote."""
        return self.finished and self.finish_reason in ("eos", "boxed")


@dataclass
class ModelCost:
    """Work of one model. Adds up with `+`."""

    tokens_prefilled: int = 0  # prompt (policy) or new text (verifier) pushed through in a chunk
    tokens_decoded: int = 0  # sampled one by one
    tokens_reused: int = (
        0  # already cached when a child began or was scored: a stack that shares no KV computes them again
    )
    tokens_speculated: int = 0  # decoded ahead of a request and dropped
    tokens_recomputed: int = 0  # computed again after an eviction
    flops: float = 0.0

    def __add__(self, other: ModelCost) -> ModelCost:
        return ModelCost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass
class Cost:
    """Work of a search. `+` adds everything except `peak_kv_bytes`, of which it keeps the larger."""

    policy: ModelCost = field(default_factory=ModelCost)
    verifier: ModelCost = field(default_factory=ModelCost)
    seconds_prefill: float = 0.0
    seconds_decode: float = 0.0
    seconds_score: float = 0.0
    seconds_other: float = 0.0
    peak_kv_bytes: int = 0

    @property
    def flops(self) -> float:
        return self.policy.flops + self.verifier.flops

    def __add__(self, other: Cost) -> Cost:
        merged = Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))
        merged.peak_kv_bytes = max(self.peak_kv_bytes, other.peak_kv_bytes)
        return merged


@dataclass
class SearchResult:
    """What a strategy returns, always this type.

    `votes` maps each answer to its weight; `num_voted` paths of `candidates` had an answer to vote for.
    `duplicates` counts candidates whose text repeats an earlier candidate's: they are kept and vote once per
    path.
    """

    problem: Problem
    strategy: str
    budget: Budget
    answer: str | None
    best: SearchNode | None
    candidates: list[SearchNode]
    votes: dict[str, float]
    num_voted: int
    duplicates: int
    cost: Cost = field(default_factory=Cost)
    seconds: float = 0.0
    interrupted: bool = False
    root: SearchNode | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready record: everything but the tree of pruned branches."""
        from .record import result_to_dict

        return result_to_dict(self)
