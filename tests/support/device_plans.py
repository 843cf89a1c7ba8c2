"""Plans of one decode iteration over random small trees."""

import random

from ttskernels.kv.plan import Plan, plan_from_parents
from ttskernels.kv.plan_layout import HeadShape, Machine

HEADS = HeadShape(2, 1, 64, 64, 4)


def leaves_plan(seed: int) -> Plan:
    """A root with leaves below, each on shuffled pages, with different room to grow."""
    rng = random.Random(seed)
    leaves = rng.randint(1, 7)
    length = [rng.randint(1, 40)] + [rng.randint(1, 20) for _ in range(leaves)]
    pages = [-(-length[0] // 16)] + [-(-n // 16) + rng.randint(1, 3) for n in length[1:]]
    ids = list(range(sum(pages)))
    rng.shuffle(ids)
    indptr = [0]
    for n in pages:
        indptr.append(indptr[-1] + n)
    rows = list(range(1, leaves + 1))
    rng.shuffle(rows)
    return plan_from_parents(
        [-1] + [0] * leaves, length, indptr, ids, rows, [length[0] + length[v] - 1 for v in rows], HEADS,
        cached=[length[0]] + [n - 1 for n in length[1:]], machine=Machine(workers=3, queues=3),
    )  # fmt: skip
