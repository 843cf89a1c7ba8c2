"""Random forests with reserved, shuffled pages, and rows to plan over them."""

import random

import torch

from ttskernels.kv import Forest, PagePool


def random_forest(
    rng: random.Random, *, lengths=(0, 1, 5, 16, 17, 60, 200), depth=4, fan_out=4, roots=2, num_pages=16384
):
    """A forest and its leaves: open nodes with at least one id, the last not cached, and slack."""
    forest = Forest(PagePool(1, 1, 2, num_pages, torch.float32))
    pages = forest.pool.take(num_pages)
    rng.shuffle(pages)
    forest.pool.give(pages)
    leaves = []

    def grow(parent, level):
        node = forest.add(parent, [rng.randrange(100) for _ in range(rng.choice(lengths))])
        forest.reserve([node], 0)
        children = rng.randrange(1, fan_out + 1) if level < depth and rng.random() < 0.8 else 0
        if children == 0:
            forest.reserve([node], rng.choice([1, 16, 100]))
            forest.mark_cached([node])
            forest.append(node, [7])
            leaves.append(node)
            return
        forest.mark_cached([node])
        for _ in range(children):
            grow(node, level + 1)

    for _ in range(roots):
        grow(None, 0)
    return forest, leaves


def decode_rows(leaves):
    return [(leaf, len(leaf.ids) - 1, 1) for leaf in leaves]


def mixed_rows(rng: random.Random, forest, leaves):
    """Decode rows, several rows of one node, and rows on inner nodes, in random order."""
    rows = []
    for leaf in leaves:
        count = rng.randrange(1, len(leaf.ids) + 1) if rng.random() < 0.4 else 1
        rows.append((leaf, len(leaf.ids) - count, count))
    inner = sorted(
        {n for leaf in leaves for n in forest.path(leaf)[:-1] if n.ids}, key=lambda n: (n.pos0, n.pages)
    )
    for node in inner:
        if rng.random() < 0.3:
            first = rng.randrange(len(node.ids))
            rows.append((node, first, rng.randrange(1, len(node.ids) - first + 1)))
    rng.shuffle(rows)
    return rows
