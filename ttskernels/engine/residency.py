"""Which nodes have their KV in memory. Two forests draw on one byte budget; the oldest problem always advances.

When pages run out, victims are nodes that no earlier branch reads: of the youngest problem first, deepest first. An
evicted node keeps its ids and is recomputed, bit for bit, when a branch needs it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ttskernels.engine.work import Session
from ttskernels.errors import OutOfPagesError
from ttskernels.kv.forest import Forest, Node


class Residency:
    def __init__(self, sessions: list[Session]):
        self.sessions = sessions
        self.epoch = 0  # evictions so far: a path that was whole at this epoch is still whole
        self.forests: list[tuple[Forest, Callable[[Session], set[Node]]]] = []  # and a session's nodes in each
        self.spares: list[tuple[Forest, Callable[[], list[Node]]]] = []  # nodes that nobody needs yet, so they go first
        self.busy_before: Callable[[int], set[Node]] = lambda order: set()  # nodes of decoding problems older than one

    def reserve(self, forest: Forest, needs: dict[Node, int], pinned: set[Node], session: Session) -> bool:
        """Make room for `needs` (node -> tokens beyond its ids), evicting what `session` may evict if necessary.

        Nodes in `pinned` keep their pages, and so do the decoding branches of problems older than `session`.
        Returns False, with nothing reserved, when no victim is left.
        """
        while True:
            try:
                forest.reserve(list(needs), list(needs.values()))
                return True
            except OutOfPagesError:
                if not self._evict_one(pinned | self.busy_before(session.order), forest):
                    return False

    def _evict_one(self, pinned: set[Node], needy: Forest) -> bool:
        pool = needy.pool
        own_bytes = (pool.num_pages - pool.used_pages) * pool.page_bytes
        full = own_bytes <= pool.budget.free_bytes  # the pool is short, not the budget: others cannot help
        for forest, spare_nodes in self.spares:
            held = [n for n in spare_nodes() if n.pages and n not in pinned]
            if held and not (full and forest is not needy):
                forest.evict(max(held, key=lambda n: n.pos0))
                self.epoch += 1
                return True
        for session in sorted(self.sessions, key=lambda s: s.order, reverse=True):
            for forest, nodes_of in self.forests:
                if full and forest is not needy:
                    continue
                nodes = nodes_of(session)
                nodes.difference_update([n for n in nodes if n.released])
                held = [n for n in nodes if n.pages and n not in pinned]
                if held:
                    forest.evict(max(held, key=lambda n: (n.pos0, len(n.ids))))
                    self.epoch += 1
                    return True
        return False


def missing(path: Iterable[Node]) -> dict[Node, int]:
    """Nodes of a path that have fewer slots than ids: what must be reserved, without extra tokens, to recompute it."""
    return {node: 0 for node in path if node.capacity < len(node.ids)}


def uncached_rows(
    forest: Forest, sources: Iterable[Node], max_rows: int, whole: bool = False
) -> tuple[list[tuple[Node, int, int]], dict[Node, int]]:
    """Query rows (node, first, count) that compute all that is uncached on the paths to `sources`, and each source's
    last token; at most `max_rows` of them, in the order of `sources`. With `whole`, no node is cut in two.

    Returns:
        rows, and for each node that ends up complete the index of its last token's row.
    """
    rows: list[tuple[Node, int, int]] = []
    last_row: dict[Node, int] = {}
    count = 0
    for source in sources:
        if source in last_row:
            continue
        todo = [n for n in forest.path(source) if n not in last_row and (n.cached < len(n.ids) or n is source)]
        for node in todo:
            first = min(node.cached, len(node.ids) - 1)
            take = min(len(node.ids) - first, max_rows - count)
            if whole and rows and take < len(node.ids) - first:
                return rows, last_row
            if whole:
                take = len(node.ids) - first
            if take <= 0:
                return rows, last_row
            rows.append((node, first, take))
            count += take
            if first + take < len(node.ids):
                return rows, last_row
            last_row[node] = count - 1
    return rows, last_row
