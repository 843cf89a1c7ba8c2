"""How much a search may spend, and with which rules it decides."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .aggregate import AGGREGATES
from .vote import VOTES


@dataclass(frozen=True)
class Limits:
    """When decoding of one path stops by itself; a token limit finishes it, with reason "length"."""

    max_steps: int
    max_tokens: int  # generated on the whole path
    max_step_tokens: int


@dataclass(frozen=True)
class Budget:
    """N paths per problem, and the rules of the search.

    Args:
        n: paths kept alive per problem. A finished path keeps its slot and counts.
        width: beam width M, children per survivor. Beam search and DVTS keep K = n // width survivors.
        max_steps, max_tokens, max_step_tokens: per path, see `Limits`.
        temperature, top_k, top_p, min_p: sampling, applied in that order; 0, 0, 1, 0 switch them off.
        seed: same seed, same tree.
        aggregate: path score from step scores: "product", "min", "mean" or "last". None: the strategy needs
            none.
        vote: how paths become an answer: "max", "weighted", "softmax" or "majority". None: the strategy needs
            none.
    Raises:
        ValueError: a number out of range or an unknown rule.
    """

    n: int
    width: int = 4
    max_steps: int = 40
    max_tokens: int = 8192
    max_step_tokens: int = 2048
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    aggregate: str | None = None
    vote: str | None = None

    def __post_init__(self):
        for name in ("n", "width", "max_steps", "max_tokens", "max_step_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if not self.temperature >= 0:
            raise ValueError(
                f"temperature must be >= 0 (0: always the likeliest token), got {self.temperature!r}"
            )
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k must be an integer >= 0 (0: off), got {self.top_k!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p!r}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p!r}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"seed must be an integer, got {self.seed!r}")
        if self.aggregate is not None and self.aggregate not in AGGREGATES:
            raise ValueError(f"aggregate must be one of {', '.join(AGGREGATES)}, got {self.aggregate!r}")
        if self.vote is not None and self.vote not in VOTES:
            raise ValueError(f"vote must be one of {', '.join(VOTES)}, got {self.vote!r}")

    @property
    def survivors(self) -> int:
        """K = N // M; for DVTS also the number of subtrees."""
        if self.n % self.width:
            lower, upper = self.n - self.n % self.width, self.n + self.width - self.n % self.width
            nearest = f"{lower} or {upper}" if lower else f"{upper}"
            raise ValueError(
                f"n must be a multiple of width={self.width}, got {self.n}; use n={nearest}, or another width"
            )
        return self.n // self.width

    @property
    def limits(self) -> Limits:
        return Limits(self.max_steps, self.max_tokens, self.max_step_tokens)

    def require(self, strategy: str, *rules: str) -> None:
        """Refuse to guess: a strategy that needs `aggregate` or `vote` must be given it."""
        for rule in rules:
            if getattr(self, rule) is None:
                choices = ", ".join({"aggregate": AGGREGATES, "vote": VOTES}[rule])
                raise ValueError(
                    f"{strategy} needs {rule}, got None; pass Budget({rule}=...), one of {choices}"
                )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
