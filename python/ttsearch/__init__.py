"""Search over reasoning steps, guided by a process reward model: strategies, votes, grading, evaluation."""

from .backend import load_backend, load_verifier
from .budget import Budget, Limits
from .protocols import Backend, Policy, Verifier, VerifierSession
from .run import Progress, search
from .scoring import SolutionScores, score_steps
from .solve import solve, solve_many
from .strategies import STRATEGIES
from .types import Cost, ModelCost, PathScores, Problem, Scored, SearchNode, SearchResult

__all__ = [
    "STRATEGIES", "Backend", "Budget", "Cost", "Limits", "ModelCost", "PathScores", "Policy", "Problem", "Progress",
    "Scored", "SearchNode", "SearchResult", "SolutionScores", "Verifier", "VerifierSession", "load_backend",
    "load_verifier", "score_steps", "search", "solve", "solve_many",
]  # fmt: skip
