"""What the engine works on: sessions (one per problem), branches (one step or one whole path each) and score jobs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, fields

from ttskernels.kv.forest import Node


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of a branch; temperature 0 is argmax. See docs/internals.md, "Sampling"."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 1e38 or not 1e-37 < self.top_p <= 1 or not 0 <= self.min_p < 1 or self.top_k < 0:
            raise ValueError(
                "sampling needs 0 <= temperature <= 1e38, 0 < top_p <= 1 (both float32), 0 <= min_p < 1, top_k >= 0, "
                f"got {self}"
            )


@dataclass
class Counters:
    """What a session cost. Tokens are counted once per forward row; `reused` are prefix tokens that did not have
    to be computed for a branch or a score job because another one had them (a branch counts those evicted since as well);
    seconds of a shared batch are split by rows."""

    policy_prefilled: int = 0
    policy_decoded: int = 0
    policy_reused: int = 0
    policy_recomputed: int = 0
    policy_speculated: int = 0  # decoded before anybody asked and dropped; not among policy_decoded
    verifier_prefilled: int = 0
    verifier_reused: int = 0
    verifier_recomputed: int = 0
    policy_flops: float = 0.0
    verifier_flops: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    score_seconds: float = 0.0
    peak_kv_bytes: int = 0

    def __add__(self, other: Counters) -> Counters:
        total = Counters(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})
        total.peak_kv_bytes = max(self.peak_kv_bytes, other.peak_kv_bytes)
        return total


@dataclass(eq=False)
class Session:
    """One problem: its prompt in the policy's forest, in the verifier's forest, or in both."""

    order: int  # age: a smaller one is older and goes first; equal for sessions of one problem
    root: Node | None
    verifier_root: Node | None
    counters: Counters = field(default_factory=Counters)
    policy_nodes: set[Node] = field(default_factory=set)  # created for this problem; released ones are swept later
    verifier_nodes: set[Node] = field(default_factory=set)
    closed: bool = False


@dataclass(frozen=True)
class StepEnd:
    """A branch reached the end of a step. `reason`: "step", "end" (the stop automaton) or "length". With `more`, the
    branch goes on in a child of `node` by itself, and the handle on `node` is already given back."""

    node: Node
    ids: tuple[int, ...]
    reason: str
    logprob: float
    key: int
    more: bool = False

    @property
    def finished(self) -> bool:
        return self.reason != "step"


@dataclass(eq=False)
class Branch:
    """A path being decoded. `node` is its leaf; empty until the first token is sampled from the parent's logits."""

    session: Session
    node: Node
    key: int
    path_key: tuple[int, ...]
    sampling: Sampling
    max_step_tokens: int
    max_length: int  # of the whole path in tokens, prompt included
    steps_left: int  # 1: end with this step; more: go on with the next step by itself
    on_step: Callable[[StepEnd | BaseException], None] = lambda end: None
    whole: bool = False  # at that epoch: everything but the last token has its KV
    group: object = None  # what `Engine.cancel` names
    state: int = 0
    logprob: float = 0.0
    resident_epoch: int = -1  # of Residency, when the whole path was last known to be in memory
    ahead: bool = False  # nobody has asked for it yet: see ahead.py
    parent: Node | None = None  # of one that is ahead
    end: StepEnd | None = None  # of one that has ended before it was asked for

    @property
    def priority(self) -> tuple:
        return (self.session.order, self.path_key)

    @property
    def source(self) -> Node:
        """The node whose last token's logits give this branch's next token."""
        return self.node if self.node.ids else self.node.parent


@dataclass(eq=False)
class ScoreJob:
    """New verifier tokens below `parent`; `reads` are indices into `ids` of the tokens whose hidden state is scored.

    `targets`: for two models, the token behind each read; its first read may be -1, the last token above `ids`.

    The job holds a handle on `parent` (None: a chain of its own) until it is done, and on `node` while it runs."""

    session: Session
    parent: Node | None
    ids: list[int]
    reads: list[int]
    result: Future  # of (Node, list[float])
    targets: list[int] = field(default_factory=list)
    node: Node | None = None
