"""What a strategy asks of an engine: the local one, an HTTP server and the tests' scripted one all fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from .budget import Budget, Limits
from .types import Cost, ModelCost, Problem, Scored, SearchNode


@runtime_checkable
class Policy(Protocol):
    """A session of one problem: a tree that grows by `expand` and gives KV back by `release`.

    Every node that `expand` returns must be released once, by whoever asked for it. The root belongs to the
    session and goes with `close`.
    """

    root: SearchNode

    async def expand(
        self,
        nodes: Sequence[SearchNode],
        n: int | Sequence[int],
        until: Literal["step", "end"] = "step",
        score: bool = True,
        limits: Limits | None = None,
    ) -> list[SearchNode]:
        """Grow `n` children of each node, `n` one number or one per node.

        Returns the children in order: all of `nodes[0]`, then all of `nodes[1]`. A child's path key is its
        parent's plus the ordinal it got, counted over every child the parent ever had, so the tree does not
        depend on timing. Each is appended to `parent.children` once its step has ended and, with `score` and
        a verifier, has been scored.

        until="end" continues every child alone (ordinal 0 each time) to a finished node or
        `limits.max_steps`, one node a step, and returns the last node of each chain. The chain's inner nodes
        come already released.

        `limits` None means those of the budget the session was opened with. `max_tokens` counts the whole
        path. A child that hits a token limit, or that the verifier cannot take (reason "refused", no score),
        is returned finished. A cancelled call keeps children that had ended in the tree, released, and drops
        the others.

        Raises:
            ValueError: a node is finished, released or of another session.
        """
        ...

    def release(self, nodes: Iterable[SearchNode]) -> None:
        """Say that these nodes will not be expanded again, and set `released`. Never blocks.

        KV goes back when a node and everything below it is released, so a survivor may be released as soon as
        its children exist.

        Raises:
            ValueError: a node was released before, or is the root.
        """
        ...

    def cost(self) -> Cost:
        """Work done for this session so far; may be called while an `expand` runs."""
        ...

    def close(self) -> None:
        """End the session: the root and whatever is left go back to the engine. May be called twice."""
        ...


@runtime_checkable
class Backend(Protocol):
    """Models loaded once, sessions opened per problem; several sessions may run at the same time."""

    has_verifier: bool

    def open(self, problem: Problem, budget: Budget) -> Policy:
        """Start a session: decode with `budget`'s sampling and limits.

        Raises:
            ValueError: the problem cannot fit (prompt plus one path), with the numbers.
        """
        ...

    def close(self) -> None: ...


@runtime_checkable
class VerifierSession(Protocol):
    """One problem of a verifier: chains of steps that grow by `score`, each behind a handle.

    `root` is the problem without a step; it belongs to the session and goes with `close`. `seconds` is the time spent.
    """

    root: Any
    seconds: float

    async def score(self, parent: Any, steps: Sequence[str]) -> Scored:
        """Score `steps`, one behind the other, behind the chain of `parent` (`root`, or a handle got from `score`).

        Only what the chain does not hold yet is computed. A chain may be scored on several times: it forks. A path that
        the verifier cannot take is refused, not cut. The handle that comes back must be released once, by whoever asked.

        Raises:
            ValueError: no step, or a score that is not finite; the session goes on.
        """
        ...

    def release(self, handles: Iterable[Any]) -> None:
        """Say that these chains will not be scored on. Never blocks."""
        ...

    def cost(self) -> ModelCost:
        """Work done for this session so far."""
        ...

    def close(self) -> None:
        """End the session and give back what is left. May be called twice."""
        ...


@runtime_checkable
class Verifier(Protocol):
    """A verifier loaded once; sessions are opened per problem, and several may run at the same time."""

    name: str  # what results say their scores come from

    def open(self, problem: str, *, max_new_tokens: int = 0, beside: Any = None) -> VerifierSession:
        """Start a problem.

        Args:
            max_new_tokens: of the longest path to come, as far as the caller knows.
            beside: the policy's session of the same problem, where both share an engine.
        Raises:
            ValueError: the problem alone is too long, with the numbers.
        """
        ...

    def close(self) -> None: ...
