"""Best-of-N: sample N solutions, let a process reward model choose.

Lightman et al. 2023, "Let's Verify Step by Step", arXiv:2305.20050 (product and min of step scores);
Snell et al. 2024, "Scaling LLM Test-Time Compute Optimally", arXiv:2408.03314 (weighted vote);
Liu et al. 2025, "Can 1B LLM Surpass 405B LLM?", arXiv:2502.06703 (PRM-{Min,Last,Avg} x {Max,Vote}).
"""

from ..budget import Budget
from ..protocols import Policy
from ..record import conclude
from ..tree import release
from ..types import Problem, SearchResult


async def best_of_n(problem: Problem, policy: Policy, budget: Budget) -> SearchResult:
    """Score every step of N independent paths, then vote by `budget.vote` over `budget.aggregate`.

    PRM-Min-Max of the papers is aggregate="min" with vote="max", PRM-Last-Vote is "last" with "weighted".
    """
    budget.require("best_of_n", "aggregate", "vote")
    paths = []
    try:
        paths = await policy.expand([policy.root], budget.n, until="end", score=True)
        return conclude(
            problem, policy, budget, paths,
            strategy="best_of_n", aggregate=budget.aggregate, vote=budget.vote,
        )  # fmt: skip
    finally:
        release(policy, paths)
