"""Drive a model over a small forest, and the same paths through transformers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ttskernels.kv import Forest
from ttskernels.kv.plan import build_plan


@dataclass
class Tree:
    """A model with a pool and a forest. `seen` collects (path ids up to a row, that row's output)."""

    model: object
    num_pages: int = 64
    seen: list = field(default_factory=list)

    def __post_init__(self):
        self.pool = self.model.new_pool(self.num_pages)
        for pages in (self.pool.k, self.pool.v):
            pages.view(torch.uint8).fill_(0xFF)  # NaN, also of scales: an unused slot must never be read
        self.forest = Forest(self.pool)

    def plan(self, rows):
        return build_plan(self.forest, rows, self.model.heads, machine=self.model.machine)

    def run(self, chunks, out=None, output="logits"):
        """Compute the uncached ids of every node in `chunks`; `out` picks rows (all of them if None)."""
        chunks = [node for node in chunks if len(node.ids) > node.cached]
        self.forest.reserve(chunks, 0)
        rows = [(node, node.cached, len(node.ids) - node.cached) for node in chunks]
        ids = torch.tensor([i for node, first, _ in rows for i in node.ids[first:]], dtype=torch.int32)
        keep = range(len(ids)) if out is None else out
        result = self.model.forward(
            ids, self.plan(rows), self.pool, torch.tensor(list(keep), dtype=torch.int32), output
        )
        paths = [
            self.forest.path_ids(node)[: node.pos0 + index + 1]
            for node, first, count in rows
            for index in range(first, first + count)
        ]
        self.seen += [(paths[row], result[i]) for i, row in enumerate(keep)]
        self.forest.mark_cached(chunks)
        return result

    def grow(self, node, ids):
        self.forest.reserve([node], len(ids))
        self.forest.append(node, ids)


def walk(model, vocab: int, seed: int = 0, output: str = "logits") -> list[tuple[list[int], torch.Tensor]]:
    """Prefill of two prompts, a fork with ragged steps, a second fork, then three decode iterations of all leaves."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n):
        return torch.randint(0, vocab, (n,), generator=generator).tolist()

    tree = Tree(model)
    first, second = tree.forest.add(None, ids(37)), tree.forest.add(None, ids(16))
    tree.run([second, first], output=output)
    steps = tree.forest.fork(first, 3)
    for node, n in zip(steps, (5, 1, 8), strict=True):
        tree.grow(node, ids(n))
    tree.run(steps, out=[4, 5, 13, 0], output=output)  # last rows of the steps, in a mixed order
    leaves = [*tree.forest.fork(steps[0], 2), *tree.forest.fork(second, 1), steps[2]]
    for _ in range(3):
        for leaf in leaves:
            tree.grow(leaf, ids(1))
        tree.run(leaves, output=output)
    tree.forest.check_integrity()
    return tree.seen


def stack(seen) -> torch.Tensor:
    return torch.stack([result for _, result in seen])


@torch.no_grad()
def expected(forward, seen) -> torch.Tensor:
    """Rows of `seen` by dense recomputation: `forward(ids [1, n]) -> [1, n, width]` once per maximal path."""
    paths = {tuple(path) for path, _ in seen}
    maximal = [p for p in paths if not any(len(q) > len(p) and q[: len(p)] == p for q in paths)]
    dense = {path: forward(torch.tensor([path]))[0] for path in maximal}
    rows = []
    for path, _ in seen:
        whole = next(p for p in maximal if p[: len(path)] == tuple(path))
        rows.append(dense[whole][len(path) - 1])
    return torch.stack(rows)
