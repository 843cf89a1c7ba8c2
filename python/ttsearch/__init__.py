"""Search over reasoning steps, guided by a process reward model: strategies, votes, grading, evaluation."""

from .budget import Budget, Limits
from .protocols import Backend, Policy
from .types import Cost, ModelCost, Problem, SearchNode, SearchResult

__all__ = ["Backend", "Budget", "Cost", "Limits", "ModelCost", "Policy", "Problem", "SearchNode", "SearchResult"]
