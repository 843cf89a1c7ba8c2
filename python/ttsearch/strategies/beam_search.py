"""Beam search over reasoning steps, guided by a process reward model.

Snell et al. 2024, "Scaling LLM Test-Time Compute Optimally", arXiv:2408.03314, section 5;
Liu et al. 2025, "Can 1B LLM Surpass 405B LLM?", arXiv:2502.06703.
"""

from math import ceil

from ..aggregate import ranked
from ..budget import Budget
from ..protocols import Policy
from ..record import conclude
from ..tree import prune, release
from ..types import Problem, SearchResult


async def beam_search(problem: Problem, policy: Policy, budget: Budget) -> SearchResult:
    """Keep N paths; at each step the best unfinished ones survive and are continued M ways.

    There are exactly N paths at all times. A finished path keeps its slot for good and is never pruned. With
    F finished, N - F slots are free: the ceil((N - F) / M) best unfinished paths survive (K = N / M while F =
    0) and share the slots, M children each, the last of them what is left. Ends when every path is finished
    or `max_steps` deep. All N paths are candidates; siblings of the last step are correlated voters, which
    the result's `duplicates` shows in part.
    """
    budget.require("beam_search", "aggregate", "vote")
    width = budget.width
    _ = budget.survivors  # N not divisible by M raises here, before anything is decoded
    paths = []
    try:
        paths = await policy.expand([policy.root], budget.n)
        for _ in range(1, budget.max_steps):
            done = [path for path in paths if path.finished]
            alive = ranked([path for path in paths if not path.finished], budget.aggregate)
            if not alive:
                break
            slots = budget.n - len(done)
            survivors = alive[: ceil(slots / width)]
            prune(policy, alive[len(survivors) :])
            shares = [min(width, slots - i * width) for i in range(len(survivors))]
            children = await policy.expand(survivors, shares)
            paths = done + children
            release(policy, survivors)
        return conclude(
            problem, policy, budget, paths,
            strategy="beam_search", aggregate=budget.aggregate, vote=budget.vote,
        )  # fmt: skip
    finally:
        release(policy, paths)
