"""The forest: nodes of token ids and their KV pages. Forking moves no KV; only `reserve` takes pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ttskernels.errors import OutOfPagesError, ReleasedNodeError
from ttskernels.kv.pool import PAGE_SIZE, PagePool


class Node:
    """A run of tokens with a parent. Read its fields; change it through its forest only.

    `refs` counts handles (retain / release); children keep a node alive as well. `released` is True once the
    node is gone. `pages[0]` is used from slot `first_offset` on, which is 0 except below a split.
    """

    __slots__ = (
        "parent", "ids", "pos0", "cached", "pages", "first_offset", "sealed", "refs", "released", "children",
        "owner", "seen", "_lender", "_borrower",
    )  # fmt: skip

    def __init__(self, parent: Node | None, ids: list[int], pos0: int):
        self.parent = parent
        self.ids = ids
        self.pos0 = pos0
        self.cached = 0
        self.pages: list[int] = []
        self.first_offset = 0
        self.sealed = False
        self.refs = 1
        self.released = False
        self.children = 0
        self.owner: object | None = None  # for the user's notes, inherited; the forest does not read them
        self.seen = 0  # most ids that ever had their KV computed: what is computed again below this is a recompute
        self._lender: Node | None = None  # owns pages[0] together with me: my upper half after a split
        self._borrower: Node | None = None  # reads pages[-1] from its own offset on: my lower half

    @property
    def capacity(self) -> int:
        """Slots reserved for this node's tokens."""
        return len(self.pages) * PAGE_SIZE - self.first_offset

    def __repr__(self) -> str:
        state = "released" if self.released else "sealed" if self.sealed else "open"
        held = f"{self.cached} cached, {len(self.pages)} pages"
        return f"Node({len(self.ids)} ids at {self.pos0}, {held}, {state})"


class Forest:
    """All live nodes over one page pool.

    Every node a verb returns holds one handle for the caller, who releases it. `add`, `fork`, `split`,
    `append`, `truncate` and `release` need a held handle; the other verbs take any live node (such as one of
    `path(leaf)`). A verb that raises has changed nothing.
    """

    def __init__(self, pool: PagePool):
        self.pool = pool
        self._live: set[Node] = set()

    def add(self, parent: Node | None, ids: Iterable[int]) -> Node:
        """A new node holding `ids`, their KV not computed yet; seals `parent`."""
        ids = list(ids)
        if parent is None:
            node = Node(None, ids, 0)
        else:
            self._need_handle(parent, "add")
            self._seal(parent)
            parent.children += 1
            node = Node(parent, ids, parent.pos0 + len(parent.ids))
            node.owner = parent.owner
        self._live.add(node)
        return node

    def fork(self, node: Node, n: int) -> list[Node]:
        """`n` empty children of `node`, which is sealed. Moves no KV and takes no page."""
        self._need_handle(node, "fork")
        if n < 0:
            raise ValueError(f"fork(node, n) needs n >= 0, got {n}")
        self._seal(node)
        pos0 = node.pos0 + len(node.ids)
        children = [Node(node, [], pos0) for _ in range(n)]
        for child in children:
            child.owner = node.owner
        node.children += n
        self._live.update(children)
        return children

    def reserve(self, nodes: Sequence[Node], tokens: int | Sequence[int]) -> None:
        """Slots for every id of `nodes` and `tokens` more each (a number, or one per node), all or none.

        Raises:
            OutOfPagesError: too few free pages; nothing has changed.
            ValueError: growth asked of a sealed node (0 is fine: the slots for recomputing an evicted node).
        """
        counts = [tokens] * len(nodes) if isinstance(tokens, int) else tokens
        if len(counts) != len(nodes):
            raise ValueError(
                f"tokens must be one number or one per node, got {len(counts)} for {len(nodes)} nodes"
            )
        if len(set(nodes)) != len(nodes):
            raise ValueError("reserve: a node occurs twice in nodes; pass it once with the larger count")
        need = []
        for node, count in zip(nodes, counts, strict=True):
            if node.released:
                self._raise_released(node, "reserve")
            if count < 0 or (count > 0 and node.sealed):
                raise ValueError(
                    f"reserve: {count} more tokens asked of {node}; fork it and reserve for the children"
                )
            slots = node.first_offset + len(node.ids) + count
            need.append(max(0, (slots + PAGE_SIZE - 1) // PAGE_SIZE - len(node.pages)))
        total = sum(need)
        if total > self.pool.num_free:
            most = max(counts, default=0)
            raise OutOfPagesError(
                f"reserve({len(nodes)} nodes, {most} tokens) needs {total} pages, "
                f"{self.pool.describe_free()}; release nodes or raise num_pages"
            )
        if self.pool.keeps_runs:
            for node, n in zip(nodes, need, strict=True):
                if n:
                    node.pages += self.pool.take(n, after=node.pages[-1] if node.pages else None)
            return
        pages = self.pool.take(total)
        at = 0
        for node, n in zip(nodes, need, strict=True):
            if n:
                node.pages += pages[at : at + n]
                at += n

    def append(self, node: Node, ids: Iterable[int]) -> None:
        """More ids at the end of an open node, within its reserved slots; their KV is not computed yet."""
        self._need_handle(node, "append")
        self._need_open(node, "append")
        ids = list(ids)
        if len(node.ids) + len(ids) > node.capacity:
            raise ValueError(
                f"append: {len(node.ids)} + {len(ids)} ids need as many slots, {node.capacity} are reserved; "
                f"call reserve([node], {len(ids)}) first"
            )
        node.ids += ids

    def mark_cached(self, nodes: Iterable[Node]) -> None:
        """Every id of these nodes now has its KV in the pool."""
        nodes = list(nodes)
        for node in nodes:
            if node.released:
                self._raise_released(node, "mark_cached")
            if node.capacity < len(node.ids):
                raise ValueError(
                    f"mark_cached: {node} has {node.capacity} slots reserved; call reserve first"
                )
        for node in nodes:
            node.cached = len(node.ids)

    def truncate(self, leaf: Node, n: int) -> None:
        """Keep the first `n` ids of an open node and give back the pages past them (reserved slots too)."""
        self._need_handle(leaf, "truncate")
        self._need_open(leaf, "truncate")
        if not 0 <= n <= len(leaf.ids):
            raise ValueError(f"truncate: n must be in 0..{len(leaf.ids)}, got {n}")
        del leaf.ids[n:]
        leaf.cached = min(leaf.cached, n)
        self._trim(leaf)

    def split(self, node: Node, at: int) -> Node:
        """Cut `node` before its id `at`; returns the new upper half. `node` stays the lower half.

        No KV moves: if the cut is inside a page, that page belongs to the upper half and the lower half reads
        it from its offset on. Results after a split agree with those before it within rounding.
        """
        self._need_handle(node, "split")
        if not 0 < at < len(node.ids):
            raise ValueError(f"split: at must be in 1..{len(node.ids) - 1}, got {at}")
        upper = Node(node.parent, node.ids[:at], node.pos0)
        upper.sealed = True
        upper.children = 1
        upper.owner = node.owner
        upper.cached, upper.seen = min(node.cached, at), min(node.seen, at)
        node.ids = node.ids[at:]
        node.cached -= upper.cached
        node.seen -= upper.seen
        node.parent, node.pos0 = upper, node.pos0 + at
        self._live.add(upper)
        if node.pages:
            self._split_pages(upper, node, at)
        return upper

    def _split_pages(self, upper: Node, lower: Node, at: int) -> None:
        slot = lower.first_offset + at
        cut, offset = divmod(slot, PAGE_SIZE)
        pages, lender = lower.pages, lower._lender
        upper.first_offset, upper._lender = lower.first_offset, lender
        if lender is not None:
            lender._borrower = upper
        upper.pages = pages[: cut + (offset > 0)]
        lower.pages = pages[cut:]
        # A node may hold fewer slots than ids (added, not reserved): a cut past its pages leaves
        # the lower half none.
        if not lower.pages:
            lower.first_offset, lower._lender = 0, None
            return
        lower.first_offset = offset
        lower._lender = upper if offset else None
        upper._borrower = lower if offset else None

    def evict(self, node: Node) -> None:
        """Free the node's pages and keep its ids: `reserve([node], 0)` and a prefill bring it back.

        A page that a split partner still reads stays, and becomes the partner's.
        """
        if node.released:
            self._raise_released(node, "evict")
        self.pool.give(self._drop_pages(node))

    def retain(self, node: Node) -> None:
        """One more handle on a live node."""
        if node.released:
            self._raise_released(node, "retain")
        node.refs += 1

    def release(self, node: Node) -> None:
        """Give up one handle. A node without handle and child is gone, and so is its hold on its parent."""
        self._need_handle(node, "release")
        node.refs -= 1
        pages: list[int] = []
        last: Node | None = node
        while last is not None and last.refs == 0 and last.children == 0:
            pages += self._drop_pages(last)
            last.released = True
            self._live.discard(last)
            parent, last.parent = last.parent, None
            if parent is not None:
                parent.children -= 1
            last = parent
        if pages:
            self.pool.give(pages)

    def path(self, node: Node) -> list[Node]:
        """The nodes from the root to `node`."""
        if node.released:
            self._raise_released(node, "path")
        nodes = []
        at: Node | None = node
        while at is not None:
            nodes.append(at)
            at = at.parent
        nodes.reverse()
        return nodes

    def path_ids(self, node: Node) -> list[int]:
        """Every token id from the root to the end of `node`."""
        return [i for part in self.path(node) for i in part.ids]

    def length(self, node: Node) -> int:
        """Tokens from the root to the end of `node`."""
        if node.released:
            self._raise_released(node, "length")
        return node.pos0 + len(node.ids)

    def memory_stats(self) -> dict[str, int]:
        """Nodes, tokens with a slot (`live_slots`), slots of the pages in use, bytes now and at peak."""
        pool = self.pool
        return {
            "nodes": len(self._live),
            "live_slots": sum(min(len(n.ids), n.capacity) for n in self._live),
            "allocated_slots": pool.used_pages * PAGE_SIZE,
            "used_bytes": pool.used_pages * pool.page_bytes,
            "peak_bytes": pool.peak_bytes,
        }

    def check_integrity(self) -> None:
        """Assert every invariant of the forest and its page accounting. O(nodes + pages); for tests."""
        children: dict[Node, int] = {}
        owned: list[int] = []
        for node in self._live:
            assert not node.released and node.refs >= 0 and node.refs + node.children > 0, node
            assert 0 <= node.cached <= min(len(node.ids), node.capacity), node
            parent = node.parent
            if parent is None:
                assert node.pos0 == 0, node
            else:
                assert parent in self._live and parent.sealed, node
                assert node.pos0 == parent.pos0 + len(parent.ids), node
                children[parent] = children.get(parent, 0) + 1
            assert 0 <= node.first_offset < PAGE_SIZE and (node.pages or node.first_offset == 0), node
            if node._lender is not None:
                assert (
                    node._lender in self._live and node._lender._borrower is node and node.first_offset > 0
                ), node
                assert node.pages[0] == node._lender.pages[-1], node
            if node._borrower is not None:
                assert node._borrower._lender is node and node.sealed, node
            owned += node.pages if node._lender is None else node.pages[1:]
        for node in self._live:
            assert node.children == children.get(node, 0), node
        assert len(set(owned)) == len(owned) == self.pool.used_pages, "a page has no owner or two"
        assert all(self.pool.is_used(page) for page in owned), "a node holds a free page"

    def _seal(self, node: Node) -> None:
        if not node.sealed:
            node.sealed = True
            self._trim(node)

    def _trim(self, node: Node) -> None:
        """Give back whole pages past the node's ids."""
        keep = (node.first_offset + len(node.ids) + PAGE_SIZE - 1) // PAGE_SIZE
        if keep < len(node.pages):
            self.pool.give(node.pages[keep:])
            del node.pages[keep:]

    def _drop_pages(self, node: Node) -> list[int]:
        """Take every page from the node; returns those that nobody reads any more."""
        pages, lender, borrower = node.pages, node._lender, node._borrower
        if len(pages) == 1 and lender is not None and borrower is not None:  # one page through three nodes
            lender._borrower, borrower._lender = borrower, lender
            free = []
        else:
            free = pages[lender is not None : len(pages) - (borrower is not None)]
            if lender is not None:
                lender._borrower = None
            if borrower is not None:
                borrower._lender = None  # the cut page is the borrower's now
        node.pages, node.first_offset, node.cached = [], 0, 0
        node._lender = node._borrower = None
        return free

    @staticmethod
    def _raise_released(node: Node, verb: str) -> None:
        state = "was released" if node.released else "has no handle left (its children keep it alive)"
        raise ReleasedNodeError(f"{verb}: {node} {state}; retain a node before releasing it elsewhere")

    def _need_handle(self, node: Node, verb: str) -> None:
        if node.refs == 0:
            self._raise_released(node, verb)

    @staticmethod
    def _need_open(node: Node, verb: str) -> None:
        if node.sealed:
            raise ValueError(f"{verb}: {node} is sealed; fork it (or add a child) and change the child")
