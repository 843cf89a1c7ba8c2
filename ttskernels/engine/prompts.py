"""Prompts of sessions that are closed: one that opens with the same ids finds its KV computed."""

from __future__ import annotations

from ttskernels.kv.forest import Forest, Node


class Prompts:
    """Keeps roots of one forest, on at most `most_bytes` of pages; the oldest go first, and all before anybody waits."""

    def __init__(self, forest: Forest, most_bytes: int):
        self.forest, self.most_bytes = forest, most_bytes
        self._kept: dict[tuple[int, ...], Node] = {}  # oldest first

    @property
    def nodes(self) -> list[Node]:
        return list(self._kept.values())

    @property
    def used_bytes(self) -> int:
        return sum(len(node.pages) for node in self._kept.values()) * self.forest.pool.page_bytes

    def open(self, ids: list[int]) -> Node:
        """The node of these ids, with the one handle on it: the kept one, which is so no longer, or a new one."""
        node = self._kept.pop(tuple(ids), None)
        if node is None:
            return self.forest.add(None, ids)
        # What was evicted meanwhile, and the last token's row, are computed for the new session, not again.
        node.seen = min(node.cached, len(node.ids) - 1)
        return node

    def close(self, node: Node) -> None:
        """Take over the last handle on a root without children. One that was cut in two is not the chain that a new session
        would have, and scores are a function of the chain to the last bit: it goes."""
        ids = tuple(node.ids)
        if self.most_bytes and node.parent is None and node.cached == len(ids) and ids not in self._kept:
            self._kept[ids] = node
        else:
            self.forest.release(node)
        for first in list(self._kept):
            if self.used_bytes > self.most_bytes or not self._kept[first].pages:
                self.forest.release(self._kept.pop(first))

    def clear(self) -> None:
        for node in self._kept.values():
            self.forest.release(node)
        self._kept.clear()
