"""Children started before anybody has asked for them. A cache below `Engine.branch`: a child is known by its parent, its
ordinal and what it is decoded with, so one started early is the very child asked for later, token for token.

They run only beside branches that were asked for, and they are the first to lose their pages. Those that are sure to be
asked for join any batch: an iteration reads the weights once, so the fewer there are the better. Others fill a small batch
up. What is dropped is counted as speculated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ttskernels.engine.keys import child_key
from ttskernels.engine.work import Branch, Sampling, Session, StepEnd
from ttskernels.kv.forest import Forest, Node


@dataclass(frozen=True)
class Wish:
    """The first `count` children of `parent` from ordinal `first` on, as `Engine.branch` would be asked for them."""

    parent: Node
    key: int
    path_key: tuple[int, ...]
    first: int
    count: int
    sure: bool = False  # they will be asked for


@dataclass(frozen=True)
class Decoding:
    """What besides the path decides the tokens of a child that ends with its step."""

    sampling: Sampling
    max_step_tokens: int
    max_length: int


class Ahead:
    """Wishes of each `expand` under way, best first, and the children started so far, running or ended."""

    def __init__(self, forest: Forest):
        self.forest = forest
        self._wishes: dict[object, tuple[Session, Decoding, list[Wish]]] = {}
        self._children: dict[Node, dict[tuple[int, Decoding], Branch]] = {}
        self._uncached: dict[Node, int] = {}  # of a parent nobody has asked to continue: tokens computed for us alone

    def wish(self, group: object, session: Session, decoding: Decoding, wishes: list[Wish]) -> None:
        """What to start if there is room, in place of what this group wished before."""
        self._wishes[group] = (session, decoding, [w for w in wishes if self.forest.length(w.parent) < decoding.max_length])
        if not self._wishes[group][2]:
            self.forget(group)

    def forget(self, group: object) -> None:
        """Start nothing more for this group."""
        self._wishes.pop(group, None)

    def candidates(self, sure: bool) -> Iterator[Branch]:
        """Running children and new ones of sure or of unsure wishes, in the order to be decoded; a new one is forked when it
        is drawn."""
        for session, decoding, wishes in sorted(self._wishes.values(), key=lambda entry: entry[0].order):
            for wish in wishes:
                if wish.sure != sure:
                    continue
                for ordinal in range(wish.first, wish.first + wish.count):
                    branch = self._children.get(wish.parent, {}).get((ordinal, decoding))
                    if branch is None:
                        branch = self._start(session, decoding, wish, ordinal)
                    if branch.end is None:
                        yield branch

    def take(self, parent: Node, ordinal: int, decoding: Decoding) -> Branch | None:
        """The child, if it was started; it is the caller's from now on."""
        children = self._children.get(parent, {})
        branch = children.pop((ordinal, decoding), None)
        if parent in self._children and not children:
            del self._children[parent]
        if branch is not None:
            branch.ahead = False
        return branch

    def claim(self, parent: Node) -> None:
        """Somebody asks to continue this node: nothing more is begun below it, and its tokens are no longer ours alone."""
        self._forget_parent(parent)
        self._uncached.pop(parent, None)

    def branches(self) -> list[Branch]:
        return [branch for children in self._children.values() for branch in children.values()]

    def spare_nodes(self) -> list[Node]:
        """Nodes that nobody needs yet."""
        return [branch.node for branch in self.branches()]

    def drop(self, unwanted: Callable[[Branch], bool]) -> None:
        """Forget children and count their tokens as speculated."""
        for parent, children in list(self._children.items()):
            for at, branch in [(at, b) for at, b in children.items() if unwanted(b)]:
                del children[at]
                counters, tokens = branch.session.counters, len(branch.node.ids)
                counters.policy_decoded -= tokens
                counters.policy_speculated += tokens
                if not children and parent.seen == len(parent.ids):
                    flushed = self._uncached.get(parent, 0)
                    counters.policy_prefilled -= flushed
                    counters.policy_reused += flushed
                    counters.policy_speculated += flushed
                self.forest.release(branch.node)
            if not children:
                del self._children[parent]
                self._uncached.pop(parent, None)

    def close(self, session: Session) -> None:
        self._wishes = {group: entry for group, entry in self._wishes.items() if entry[0] is not session}
        self.drop(lambda branch: branch.session is session)

    def release(self, parent: Node) -> None:
        """Nobody will ask for children of this node any more."""
        self._forget_parent(parent)
        if parent in self._children:
            self.drop(lambda branch: branch.parent is parent)

    def _forget_parent(self, parent: Node) -> None:
        for group, (session, decoding, wishes) in list(self._wishes.items()):
            if any(wish.parent is parent for wish in wishes):
                self.wish(group, session, decoding, [wish for wish in wishes if wish.parent is not parent])

    def _start(self, session: Session, decoding: Decoding, wish: Wish, ordinal: int) -> Branch:
        parent = wish.parent
        if parent not in self._children:
            self._children[parent] = {}
            self._uncached[parent] = 0 if parent.children else len(parent.ids) - parent.seen  # 0: asked for already
        child = self.forest.fork(parent, 1)[0]
        session.policy_nodes.add(child)
        branch = Branch(
            session, child, child_key(wish.key, ordinal), (*wish.path_key, ordinal), decoding.sampling,
            decoding.max_step_tokens, decoding.max_length, 1, ahead=True, parent=parent,
        )  # fmt: skip

        def keep(end: StepEnd | BaseException) -> None:
            branch.end = end

        branch.on_step = keep
        self._children[parent][ordinal, decoding] = branch
        return branch
