"""The forest against a plain dict model: random walks of all verbs, page accounting after every move."""

import random

import pytest
import torch

from ttskernels.errors import OutOfPagesError, ReleasedNodeError
from ttskernels.kv import ByteBudget, Forest, PagePool


def make_forest(num_pages=64, budget=None, strided=False):
    return Forest(PagePool(1, 1, 4, num_pages, torch.float32, budget, strided=strided))


class Walk:
    """One random walk; `model` maps a node to [parent, ids, handles], and knows nothing of pages."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.forest = make_forest(num_pages=48, strided=seed % 2 == 1)
        self.model = {}
        self.slots = {}  # node -> {index of id: (page, slot)} as first seen: a live node's KV never moves

    def held(self, where=lambda n: True):
        return [n for n in self.model if self.model[n][2] > 0 and where(n)]

    def ids(self):
        return [self.random.randrange(1000) for _ in range(self.random.choice([0, 1, 3, 15, 16, 17, 40]))]

    def step(self):
        verb = self.random.choice(
            ["add", "fork", "reserve", "append", "truncate", "split", "evict", "retain", "release"]
        )
        nodes = self.held(
            {
                "append": lambda n: not n.sealed,
                "truncate": lambda n: not n.sealed,
                "split": lambda n: len(n.ids) > 1,
                "evict": lambda n: bool(n.pages),
            }.get(verb, lambda n: True)
        )
        if nodes:
            getattr(self, verb)(self.random.choice(nodes))
        elif len(self.model) < 30:
            self.add(None)
        self.check()

    def add(self, parent):
        if len(self.model) > 40:
            return
        parent = parent if self.random.random() < 0.7 else None
        ids = self.ids()
        self.model[self.forest.add(parent, ids)] = [parent, ids, 1]

    def fork(self, node):
        if len(self.model) > 40:
            return
        free = self.forest.pool.num_free
        trimmed = 0 if node.sealed else len(node.pages) - -(-(node.first_offset + len(node.ids)) // 16)
        for child in self.forest.fork(node, self.random.randrange(4)):
            self.model[child] = [node, [], 1]
        assert self.forest.pool.num_free == free + max(0, trimmed)

    def reserve(self, node):
        nodes = list({node, *self.random.sample(list(self.model), min(3, len(self.model)))})
        tokens = [0 if n.sealed else self.random.choice([0, 1, 20]) for n in nodes]
        before = [list(n.pages) for n in nodes]
        try:
            self.forest.reserve(nodes, tokens)
        except OutOfPagesError:
            assert [n.pages for n in nodes] == before
        else:
            assert all(n.capacity >= len(n.ids) + t for n, t in zip(nodes, tokens, strict=False))
            self.forest.mark_cached(nodes)

    def append(self, node):
        ids = self.ids()
        if len(node.ids) + len(ids) > node.capacity:
            with pytest.raises(ValueError, match="call reserve"):
                self.forest.append(node, ids)
            return
        self.forest.append(node, ids)
        self.model[node][1] = self.model[node][1] + ids

    def truncate(self, node):
        n = self.random.randrange(len(node.ids) + 1)
        self.forest.truncate(node, n)
        self.model[node][1] = self.model[node][1][:n]

    def split(self, node):
        at = self.random.randrange(1, len(node.ids))
        free = self.forest.pool.num_free
        upper = self.forest.split(node, at)
        assert self.forest.pool.num_free == free
        parent, ids, handles = self.model[node]
        self.model[upper] = [parent, ids[:at], 1]
        self.model[node] = [upper, ids[at:], handles]
        old = self.slots.pop(node, {})
        self.slots[upper] = {i: s for i, s in old.items() if i < at}
        self.slots[node] = {i - at: s for i, s in old.items() if i >= at}

    def evict(self, node):
        self.forest.evict(node)
        self.slots.pop(node, None)
        assert node.cached == 0 and node.capacity == 0

    def retain(self, node):
        self.forest.retain(node)
        self.model[node][2] += 1

    def release(self, node):
        self.forest.release(node)
        self.model[node][2] -= 1
        while (
            node is not None
            and self.model[node][2] == 0
            and not any(p is node for p, _, _ in self.model.values())
        ):
            parent = self.model.pop(node)[0]
            self.slots.pop(node, None)
            assert node.released
            with pytest.raises(ReleasedNodeError, match="release: "):
                self.forest.release(node)
            node = parent

    def check(self):
        forest, model = self.forest, self.model
        forest.check_integrity()
        assert forest.memory_stats()["nodes"] == len(model)
        taken = set()
        for node, (parent, ids, handles) in model.items():
            assert node.ids == ids and node.parent is parent and node.refs == handles
            chain = [node]
            while model[chain[-1]][0] is not None:
                chain.append(model[chain[-1]][0])
            assert forest.path(node) == chain[::-1]
            assert forest.path_ids(node) == [i for n in chain[::-1] for i in model[n][1]]
            known = self.slots.setdefault(node, {})
            for stale in [i for i in known if i >= node.cached]:
                del known[stale]
            for i in range(node.cached):
                slot = divmod(node.first_offset + i, 16)
                slot = (node.pages[slot[0]], slot[1])
                assert known.setdefault(i, slot) == slot, "KV of a live token moved"
                assert slot not in taken, "two tokens in one slot"
                taken.add(slot)


@pytest.mark.parametrize("seed", range(12))
def test_random_walk(seed):
    walk = Walk(seed)
    for _ in range(250):
        walk.step()
    while walk.held():
        walk.release(walk.held()[0])
        walk.check()
    assert walk.forest.memory_stats()["nodes"] == 0
    assert walk.forest.pool.num_free == walk.forest.pool.num_pages


def test_fork_moves_nothing_and_takes_no_page():
    forest = make_forest()
    root = forest.add(None, range(20))
    forest.reserve([root], 28)
    forest.mark_cached([root])
    before = forest.pool.k.clone()
    children = forest.fork(root, 3)
    assert len(root.pages) == 2 and forest.pool.used_pages == 2  # the slack page came back
    assert all(c.pos0 == 20 and not c.pages for c in children)
    assert torch.equal(forest.pool.k.view(torch.int32), before.view(torch.int32))
    forest.reserve(children, 1)
    assert len({c.pages[0] for c in children} | set(root.pages)) == 5


def test_split_chain_shares_one_page_until_the_last_reader():
    forest = make_forest()
    low = forest.add(None, range(14))
    forest.reserve([low], 0)
    forest.mark_cached([low])
    mid = forest.split(low, 9)
    top = forest.split(mid, 4)
    page = top.pages[0]
    assert (top.pages, mid.pages, low.pages) == ([page], [page], [page])
    assert (mid.first_offset, low.first_offset, low.pos0, forest.pool.used_pages) == (4, 9, 9, 1)
    forest.evict(mid)
    forest.check_integrity()
    forest.evict(top)
    forest.check_integrity()
    assert low.pages == [page] and low.cached == 5 and forest.pool.used_pages == 1
    forest.reserve([top, mid], 0)
    forest.check_integrity()
    for node in (top, mid, low):
        forest.release(node)
    assert forest.pool.used_pages == 0


def test_release_long_chain():
    forest = make_forest(num_pages=4)
    node = forest.add(None, [1])
    first = node
    for _ in range(10_000):
        child = forest.add(node, [1])
        forest.release(node)
        node = child
    assert forest.length(node) == 10_001 and len(forest.path(node)) == 10_001
    forest.release(node)
    assert first.released and forest.memory_stats()["nodes"] == 0


def test_reserve_is_all_or_nothing():
    forest = make_forest(num_pages=4)
    nodes = forest.fork(forest.add(None, [7]), 16)
    message = (
        r"reserve\(16 nodes, 64 tokens\) needs 64 pages, 4 of 4 are free; release nodes or raise num_pages"
    )
    with pytest.raises(OutOfPagesError, match=message):
        forest.reserve(nodes, 64)
    assert forest.pool.used_pages == 0 and not any(n.pages for n in nodes)


def test_two_forests_share_one_budget():
    budget = ByteBudget(4 * 512)
    first, second = make_forest(budget=budget), make_forest(budget=budget)
    a, b = first.add(None, range(40)), second.add(None, range(20))
    first.reserve([a], 0)
    with pytest.raises(OutOfPagesError, match=r"byte budget: 512 of 2048 bytes left"):
        second.reserve([b], 0)
    first.evict(a)
    second.reserve([b], 0)
    assert (budget.used_bytes, budget.peak_bytes) == (1024, 1536)


def test_forest_invalid():
    forest = make_forest()
    root = forest.add(None, [1, 2, 3])
    with pytest.raises(ValueError, match="mark_cached: .* 0 slots reserved; call reserve first"):
        forest.mark_cached([root])
    with pytest.raises(ValueError, match=r"split: at must be in 1..2, got 3"):
        forest.split(root, 3)
    with pytest.raises(ValueError, match=r"truncate: n must be in 0..3, got 4"):
        forest.truncate(root, 4)
    with pytest.raises(ValueError, match="append: 3 \\+ 1 ids need as many slots, 0 are reserved"):
        forest.append(root, [4])
    with pytest.raises(ValueError, match="n >= 0, got -1"):
        forest.fork(root, -1)
    with pytest.raises(ValueError, match="one number or one per node, got 2 for 1"):
        forest.reserve([root], [1, 2])
    with pytest.raises(ValueError, match="occurs twice"):
        forest.reserve([root, root], 1)
    child = forest.fork(root, 1)[0]
    for verb in (lambda: forest.append(root, [4]), lambda: forest.truncate(root, 1)):
        with pytest.raises(ValueError, match="is sealed; fork it"):
            verb()
    with pytest.raises(ValueError, match="fork it and reserve for the children"):
        forest.reserve([root], 1)
    forest.release(root)
    with pytest.raises(ReleasedNodeError, match="fork: .* has no handle left"):
        forest.fork(root, 1)
    assert forest.length(root) == 3  # alive under its child
    forest.release(child)
    verbs = {
        "add": lambda: forest.add(root, []),
        "append": lambda: forest.append(root, [1]),
        "evict": lambda: forest.evict(root),
        "fork": lambda: forest.fork(root, 1),
        "length": lambda: forest.length(root),
        "mark_cached": lambda: forest.mark_cached([root]),
        "path": lambda: forest.path(root),
        "path_ids": lambda: forest.path_ids(root),
        "release": lambda: forest.release(root),
        "reserve": lambda: forest.reserve([root], 0),
        "retain": lambda: forest.retain(root),
        "split": lambda: forest.split(root, 1),
        "truncate": lambda: forest.truncate(root, 1),
    }
    for name, verb in verbs.items():
        with pytest.raises(ReleasedNodeError, match=f"{name.replace('_ids', '')}: .*released"):
            verb()
