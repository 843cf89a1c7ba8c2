"""Search over reasoning steps, guided by a process reward model: strategies, votes, grading, evaluation."""

from .backend import load_backend
from .budget import Budget, Limits
from .protocols import Backend, Policy
from .run import Progress, search
from .solve import solve, solve_many
from .strategies import STRATEGIES
from .types import Cost, ModelCost, Problem, SearchNode, SearchResult

__all__ = [
    "STRATEGIES", "Backend", "Budget", "Cost", "Limits", "ModelCost", "Policy", "Problem", "Progress",
    "SearchNode", "SearchResult", "load_backend", "search", "solve", "solve_many",
]  # fmt: skip
