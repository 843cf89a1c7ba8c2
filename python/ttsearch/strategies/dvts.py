"""Diverse verifier tree search: N / M independent subtrees, each a greedy beam.

Beeching, Tunstall, Rush 2024, "Scaling Test-Time Compute with Open Models", Hugging Face blog;
Liu et al. 2025, "Can 1B LLM Surpass 405B LLM?", arXiv:2502.06703.
"""

from ..aggregate import ranked
from ..budget import Budget
from ..protocols import Policy
from ..record import conclude
from ..tree import prune, release, together
from ..types import Problem, SearchNode, SearchResult


async def dvts(problem: Problem, policy: Policy, budget: Budget) -> SearchResult:
    """Grow K = N / M subtrees that never compete with each other, and let their K final paths vote.

    Each subtree begins with M first steps of its own, keeps the best, and continues it M ways. One path is
    exported per subtree: its last-step siblings share all but the last step, and as voters would only repeat
    it. So `num_voted` is at most N / M. A finished path competes like any other; if it is the best of its M,
    its subtree ends.
    """
    budget.require("dvts", "aggregate", "vote")
    subtrees, width = budget.survivors, budget.width

    async def grow() -> SearchNode:
        children = []
        try:
            children = await policy.expand([policy.root], width)
            while True:
                best, *others = ranked(children, budget.aggregate)
                prune(policy, others)
                if best.finished or len(best.path_key) >= budget.max_steps:
                    return best
                children = await policy.expand([best], width)
                release(policy, [best])
        finally:
            release(policy, children)

    exported = await together(grow() for _ in range(subtrees))
    return conclude(
        problem, policy, budget, exported,
        strategy="dvts", aggregate=budget.aggregate, vote=budget.vote,
    )  # fmt: skip
