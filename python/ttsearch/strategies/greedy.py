"""Greedy decoding: one path, always the likeliest token. The baseline called CoT or pass@1 in the papers."""

from ..budget import Budget
from ..protocols import Policy
from ..record import conclude
from ..tree import release
from ..types import Problem, SearchResult


async def greedy(problem: Problem, policy: Policy, budget: Budget) -> SearchResult:
    """Decode a single solution. Open the session with temperature 0 (the registry does)."""
    paths = []
    try:
        paths = await policy.expand([policy.root], 1, until="end", score=False)
        return conclude(problem, policy, budget, paths, strategy="greedy", aggregate=None, vote="majority")
    finally:
        release(policy, paths)
