"""Walking and tending a search tree. Strategies touch KV only through `release` and `prune`."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from .types import SearchNode

if TYPE_CHECKING:
    from .protocols import Policy


def walk(root: SearchNode) -> Iterator[SearchNode]:
    """Every node below and including `root`, parents first, children by ordinal."""
    stack = [root]
    while stack:
        node = stack.pop()
        yield node
        stack += sorted(node.children, key=lambda child: child.path_key, reverse=True)


def kept_leaves(root: SearchNode) -> list[SearchNode]:
    """The leaves that no strategy pruned, by path key: what an interrupted search has in hand."""
    return [node for node in walk(root) if node is not root and not node.children and not node.pruned]


def release(policy: Policy, nodes: Iterable[SearchNode]) -> None:
    """Release those of `nodes` that still hold KV. Text and scores stay."""
    held = [node for node in nodes if not node.released]
    if held:
        policy.release(held)


def prune(policy: Policy, nodes: Iterable[SearchNode]) -> None:
    """Drop paths for good: their KV goes back at once, and they neither vote nor are reported."""
    nodes = list(nodes)
    for node in nodes:
        node.pruned = True
    release(policy, nodes)


async def together(coroutines: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Run coroutines at once, results in order; if one fails or is cancelled, all of them end first."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
