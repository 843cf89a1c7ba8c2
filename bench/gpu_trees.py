"""Trees that bench/gpu.py attends over: FastTree's, PAT's, and those of step search."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

from gpu_measure import DEVICE

from ttskernels.kv import HeadShape, Machine, plan_from_parents
from ttskernels.kv.plan import Plan
from ttskernels.models.device import device_machine

PAGE = 16
# (nodes of each level, tokens of each node), verbatim.
FASTTREE = [  # github.com/PanZaifeng/FastTree-Artifact, kernel_bench/run_benchmark.sh at 167928b
    "1,2,64 8,256,32", "1,4,256 8,256,32", "1,4,8,256 8,256,256,32", "1,256 256,32", "1,1024 2048,32",
    "1,16,64 1024,256,32", "1,4,16,512 1024,256,128,32", "1,4,16,64,256,1024 256,8,256,64,32,256", "1,10 4000,400",
    "1,2,4,8,16,32,64,128,1024 16,16,16,16,16,16,16,16,16", "1,2,4,8,16,32,64,128,1024 256,128,64,16,16,16,16,16,16",
    "1,8,16,32,64,128,1024 256,128,64,16,16,16,16", "1,8,16,32,64,256,1024 256,128,64,16,16,16,16",
    "1,16,32,64,128,1024 256,128,64,16,16,16", "1,16,32,64,256,1024 256,128,64,16,16,16",
]  # fmt: skip
FASTTREE_HEADS = [(32, 8, 128), (16, 1, 128), (32, 32, 128)]
PAT = [  # github.com/flashserve/PAT, benchmark/run_kernel_bench.sh at a76087a
    "1,10 4096,416", "1,256 256,32", "1,1024 2048,32", "1,2,64 1024,256,256", "1,4,256 32,256,32", "1,8,512 32,512,256",
    "1,8,512 32,2048,256", "1,8,512 512,512,256", "1,4,8,256 32,256,256,32", "1,4,16,512 1024,256,128,32",
    "1,4,16,64,256,1024 256,32,256,64,32,256", "1,16,32,64,128,1024 256,128,64,32,32,32",
    "1,16,32,64,256,1024 256,128,64,32,32,32", "1,8,16,32,64,128,1024 256,128,64,32,32,32,32",
    "1,8,16,32,64,256,1024 256,128,64,32,32,32,32", "2,8,16,256 256,256,32,32", "4,16,256,512 512,32,128,32",
    "8,16,32,256 512,512,256,32", "256 1024", "256 4096",
]  # fmt: skip
PAT_HEADS = [(32, 8, 128), (16, 8, 128), (64, 8, 128), (32, 32, 128)]


@dataclass(frozen=True)
class Tree:
    """Parents before their children; every leaf is one query at its last token. Leaves all have the same depth."""

    parent: list[int]
    length: list[int]

    @cached_property
    def leaves(self) -> list[int]:
        inner = set(self.parent)
        return [v for v in range(len(self.parent)) if v not in inner]

    @cached_property
    def first_page(self) -> list[int]:
        """First page of each node; its pages follow each other. One more entry: the pages of the tree."""
        first = [0]
        for tokens in self.length:
            first.append(first[-1] - -tokens // PAGE)
        return first

    def path(self, node: int) -> list[int]:
        chain = []
        while node >= 0:
            chain.append(node)
            node = self.parent[node]
        return chain[::-1]

    @cached_property
    def levels(self) -> list[list[int]]:
        """Nodes of each depth, in the order of the leaves below them."""
        paths = [self.path(leaf) for leaf in self.leaves]
        assert len({len(path) for path in paths}) == 1, "leaves at several depths"
        return [list(dict.fromkeys(level)) for level in zip(*paths, strict=True)]

    def slots(self, leaf: int) -> list[int]:
        """Slot (page * 16 + offset) of every token of a leaf's path."""
        return [self.first_page[v] * PAGE + i for v in self.path(leaf) for i in range(self.length[v])]

    def plan(
        self, heads: HeadShape, *, flat: bool = False, uncached: int = 0, scattered: bool = False, machine: Machine | None = None
    ) -> Plan:
        """One row a leaf, for this GPU or another `machine`. `flat`: each path read for itself, from the same pages. `uncached`:
        last tokens of a leaf whose K and V the caller will write. `scattered`: nodes on shuffled pages, as in a pool that was
        used for long."""
        chains = [self.path(leaf) for leaf in self.leaves] if flat else None
        parent, nodes = self.parent, list(range(len(self.parent)))
        ends = self.leaves
        if chains:
            parent, nodes, ends = [], [], []
            for chain in chains:
                for i, v in enumerate(chain):
                    parent.append(-1 if i == 0 else len(nodes) - 1)
                    nodes.append(v)
                ends.append(len(nodes) - 1)
        length = [self.length[v] for v in nodes]
        order = list(range(self.first_page[-1]))
        if scattered:
            random.Random(0).shuffle(order)
        pages = [order[self.first_page[v] : self.first_page[v + 1]] for v in nodes]
        indptr = [0]
        for part in pages:
            indptr.append(indptr[-1] + len(part))
        cached = list(length)
        for end in ends:
            cached[end] -= uncached
        depth = [sum(self.length[v] for v in self.path(leaf)) - 1 for leaf in self.leaves]
        return plan_from_parents(parent, length, indptr, [p for part in pages for p in part], ends, depth, heads,
                                 cached=cached, machine=machine or device_machine(DEVICE, heads))  # fmt: skip


def of_levels(levels: list[tuple[int, int]]) -> Tree:
    """(nodes, tokens of each) from the roots down; a level's nodes are spread evenly over those above."""
    parent, length, above = [], [], []
    for count, tokens in levels:
        nodes = list(range(len(parent), len(parent) + count))
        parent += [above[j * len(above) // count] if above else -1 for j in range(count)]
        length += [tokens] * count
        above = nodes
    return Tree(parent, length)


def of_text(text: str) -> Tree:
    """"1,256 256,32": nodes of each level, tokens of each node."""
    nodes, tokens = (map(int, part.split(",")) for part in text.split())
    return of_levels(list(zip(nodes, tokens, strict=True)))


def search_tree(strategy: str, n: int, prompt: int, *, steps: int = 6, width: int = 4, seed: int = 0) -> Tree:
    """A search in the middle of its last step: `beam` keeps n / width of all branches, `dvts` one of every width,
    `best_of_n` never branches. A step has 80 tokens, plus or minus up to 40."""
    rng = random.Random(seed)
    parent, length = [-1], [prompt]

    def grow(above: int, tokens: int) -> int:
        parent.append(above)
        length.append(max(1, tokens))
        return len(parent) - 1

    def step() -> int:
        return rng.randint(40, 120)

    if strategy == "best_of_n":
        for _ in range(n):
            grow(0, sum(step() for _ in range(steps)))
        return Tree(parent, length)
    alive = [grow(0, step()) for _ in range(n)]
    for s in range(1, steps):
        if strategy == "beam":
            kept = rng.sample(alive, n // width)
        else:
            kept = [rng.choice(alive[i : i + width]) for i in range(0, n, width)]
        last = s == steps - 1
        alive = [grow(up, step() // 2 if last else step()) for up in kept for _ in range(width)]
    return _only_above(parent, length, alive)


def _only_above(parent: list[int], length: list[int], alive: list[int]) -> Tree:
    """The nodes on the paths of `alive`: what a search has not released."""
    keep = set()
    for v in alive:
        while v >= 0 and v not in keep:
            keep.add(v)
            v = parent[v]
    order = sorted(keep)
    new = {v: i for i, v in enumerate(order)} | {-1: -1}
    return Tree([new[parent[v]] for v in order], [length[v] for v in order])


def ours() -> dict[str, Tree]:
    return {
        "beam 64, prompt 1024": search_tree("beam", 64, 1024),
        "dvts 64, prompt 1024": search_tree("dvts", 64, 1024),
        "beam 16, prompt 256": search_tree("beam", 16, 256),
        "dvts 256, prompt 1024": search_tree("dvts", 256, 1024),
        "best-of-64, prompt 1024": search_tree("best_of_n", 64, 1024),
        "prompt 2048, 64 branches of 128": of_levels([(1, 2048), (64, 128)]),
        "prompt 8192, 256 branches of 256": of_levels([(1, 8192), (256, 256)]),
        "nothing shared": of_levels([(64, 1024)]),
        "one branch": of_levels([(1, 8192)]),
    }


OUR_HEADS = [(32, 8, 128), (28, 4, 128), (12, 2, 128), (14, 2, 64), (24, 8, 128)]
