"""Numbers from results: accuracy with its interval, cost, and whether two runs really differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

_Z = 1.959963984540054  # 97.5 % point of the normal distribution


@dataclass(frozen=True)
class Summary:
    """One run over a problem file. Costs are means per problem; `errors` are problems the backend refused."""

    strategy: str
    n: int
    problems: int
    correct: int
    accuracy: float
    low: float  # 95 % Wilson interval
    high: float
    errors: int
    num_voted: float
    tokens_decoded: float
    tokens_verified: float
    flops: float
    seconds: float
    peak_kv_bytes: int
    first_error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def wilson(correct: int, total: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion: sensible at 0, at 1 and for few problems."""
    if total < 1 or not 0 <= correct <= total:
        raise ValueError(f"wilson needs 0 <= correct <= total and total >= 1, got {correct} of {total}")
    share, z2 = correct / total, _Z * _Z
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def summarise(records: Sequence[dict[str, Any]]) -> Summary:
    """Summary of one run's records; all must be graded."""
    if not records:
        raise ValueError("records must not be empty")
    ungraded = [record["id"] for record in records if "correct" not in record]
    if ungraded:
        raise ValueError(
            f"{len(ungraded)} records have no gold answer to grade by, the first is {ungraded[0]!r}"
        )
    correct, total = sum(record["correct"] for record in records), len(records)
    ran = [record for record in records if "cost" in record]

    def mean(value) -> float:
        return math.fsum(map(value, ran)) / len(ran) if ran else 0.0

    return Summary(
        strategy=records[0]["strategy"], n=records[0]["budget"]["n"], problems=total, correct=correct,
        accuracy=correct / total, low=wilson(correct, total)[0], high=wilson(correct, total)[1],
        errors=total - len(ran),
        num_voted=mean(lambda r: r["num_voted"]),
        tokens_decoded=mean(lambda r: r["cost"]["policy"]["tokens_decoded"]),
        tokens_verified=mean(lambda r: r["cost"]["verifier"]["tokens_prefilled"]),
        flops=mean(lambda r: r["cost"]["flops"]),
        seconds=mean(lambda r: r["seconds"]),
        peak_kv_bytes=max((r["cost"]["peak_kv_bytes"] for r in ran), default=0),
        first_error=next((r["error"] for r in records if "error" in r), None),
    )  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Accuracy of `b` minus accuracy of `a` over the same problems, with a 95 % paired-bootstrap interval."""

    problems: int
    difference: float
    low: float
    high: float
    only_a: int  # solved by a alone
    only_b: int

    @property
    def differs(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def compare(
    a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]], samples: int = 10_000, seed: int = 0
) -> Comparison:
    """Resample problems, not runs: both results of a problem stay together, so its difficulty cancels out.

    Raises:
        ValueError: the runs share no graded problem, or an id of both has another prompt or answer in each.
    """
    graded_a, graded_b = ({r["id"]: r for r in records if "correct" in r} for records in (a, b))
    shared = sorted(graded_a.keys() & graded_b.keys())
    if not shared:
        raise ValueError(f"the two runs share no graded problem ({len(graded_a)} and {len(graded_b)} graded)")
    for i in shared:
        for name in ("prompt", "gold"):
            one, other = graded_a[i].get(name), graded_b[i].get(name)
            if one != other:
                raise ValueError(
                    f"the two runs must be of the same problems, {i!r} has {name}={one!r:.200} in the first and "
                    f"{other!r:.200} in the second; run both on one problem file"
                )
    delta = np.array([bool(graded_b[i]["correct"]) - bool(graded_a[i]["correct"]) for i in shared], dtype=int)
    rng = np.random.default_rng(seed)
    # A resample's sum depends only on how often +1, 0, -1 come up: one multinomial draw.
    gains, losses = int((delta > 0).sum()), int((delta < 0).sum())
    total = len(shared)
    draws = rng.multinomial(
        total, [gains / total, losses / total, 1 - (gains + losses) / total], size=samples
    )
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / total, [0.025, 0.975])
    return Comparison(total, float(delta.mean()), float(low), float(high), losses, gains)


HEADER = (
    "strategy",
    "N",
    "problems",
    "accuracy",
    "95 % interval",
    "voted",
    "tokens",
    "PRM tokens",
    "GFLOP",
    "seconds",
)


def row(summary: Summary) -> tuple[str, ...]:
    errors = f" ({summary.errors} errors)" if summary.errors else ""
    return (
        summary.strategy, str(summary.n), f"{summary.problems}{errors}",
        f"{100 * summary.accuracy:.1f} %", f"{100 * summary.low:.1f} to {100 * summary.high:.1f}",
        f"{summary.num_voted:.1f}", f"{summary.tokens_decoded:,.0f}", f"{summary.tokens_verified:,.0f}",
        f"{summary.flops / 1e9:.3g}", f"{summary.seconds:.2f}",
    )  # fmt: skip


def markdown(summaries: Sequence[Summary]) -> str:
    """A table for a README; costs are means per problem."""
    rows = [HEADER, ["---"] * len(HEADER), *map(row, summaries)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
