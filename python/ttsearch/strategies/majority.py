"""Self-consistency: sample N solutions, answer what most of them answer. No verifier.

Wang et al. 2022, "Self-Consistency Improves Chain of Thought Reasoning in Language Models", arXiv:2203.11171.
"""

from ..budget import Budget
from ..protocols import Policy
from ..record import conclude
from ..tree import release
from ..types import Problem, SearchResult


async def majority(problem: Problem, policy: Policy, budget: Budget) -> SearchResult:
    """One vote per path; ties go to the answer of the smallest path key."""
    paths = []
    try:
        paths = await policy.expand([policy.root], budget.n, until="end", score=False)
        return conclude(problem, policy, budget, paths, strategy="majority", aggregate=None, vote="majority")
    finally:
        release(policy, paths)
