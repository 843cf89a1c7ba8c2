"""Proof that a plan reads what it must: every (row, visible token) exactly once, in order, with partials
where the numerics contract puts them. Pure NumPy and independent of both planners; for tests and for
debugging an integration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ttskernels.kv import plan_layout as at
from ttskernels.kv.forest import Forest, Node
from ttskernels.kv.plan import Plan


class RowView(NamedTuple):
    """What one row must read: the slot (page * page_size + offset) of each visible token from the root on,
    and the positions at which its partials begin."""

    slots: np.ndarray
    begins: np.ndarray


def expected_of_path(slots: Sequence[np.ndarray], last: int) -> RowView:
    """`slots`: of each node of the path, from the root; `last`: the row's position."""
    begins, pos0 = [], 0
    for part in slots:
        begins += range(pos0, pos0 + len(part), at.PARTIAL_TOKENS)
        pos0 += len(part)
    every = np.concatenate([np.asarray(s, np.int64) for s in slots])[: last + 1]
    return RowView(every, np.array([b for b in begins if b <= last], np.int64))


def expected_of_rows(
    forest: Forest, rows: Sequence[tuple[Node, int, int]], page_size: int = 16
) -> list[RowView]:
    """The views of `build_plan`'s rows."""
    views = []
    for node, first, count in rows:
        slots = []
        for part in forest.path(node):
            token = np.arange(len(part.ids)) + part.first_offset
            slots.append(np.array(part.pages, np.int64)[token // page_size] * page_size + token % page_size)
        views += [expected_of_path(slots, node.pos0 + first + i) for i in range(count)]
    return views


def key_of(item: np.void, group: int, row: int) -> int:
    """Where an item writes a row's partial number `group`: a slot, or -1, the row's result."""
    return int(item["slot"] + group * item["row_n"] + row - item["row_lo"]) if item["slot"] >= 0 else -1


def _read(plan: Plan) -> list[dict[int, tuple[list[int], list[int]]]]:
    """Per plan row: key -> (slots read, positions at which partials begin). The key is a slot or -1."""
    perm, pos = plan.section(at.ROW_PERM), plan.row_pos
    items, segs = plan.section(at.ITEMS), plan.section(at.SEGS)
    page_size = int(plan.buffer[at.PAGE_SIZE_AT])
    out: list[dict[int, tuple[list[int], list[int]]]] = [{} for _ in range(plan.num_rows)]
    walk = None
    for item in items:
        part = segs[item["seg_lo"] : item["seg_lo"] + item["seg_n"]]
        assert part["count"].min() > 0 and part["count"].sum() == item["tokens"], f"segments of {item}"
        assert item["row_n"] > 0 and (part["left"] >= part["count"]).all(), f"item without rows: {item}"
        assert (part["offset"] + part["count"] <= page_size).all(), f"a segment leaves its page: {item}"
        start = item["pos0"] + np.concatenate([[0], np.cumsum(part["count"])[:-1]])
        opens = np.append(True, part["left"][:-1] == part["count"][:-1])  # where a partial does
        inner = ~opens[1:]  # a piece that continues a partial
        assert (part["left"][1:][inner] == (part["left"] - part["count"])[:-1][inner]).all(), f"tokens left of {item}"
        assert (part["offset"][1:][inner] == 0).all(), f"a segment does not continue at its page's start: {item}"
        assert (part["offset"] + part["count"] == page_size)[:-1][inner].all(), f"a segment stops short: {item}"
        fold = bool(item["flags"] & at.FOLD)
        assert fold or item["slot"] >= 0 and item["pos0"] > 0, f"an item from the root folds: {item}"
        follows = bool(item["flags"] & at.FOLLOWS)
        if follows:
            of_walk = range(walk["row_lo"], walk["row_lo"] + walk["row_n"])
            assert fold and item["slot"] == -1 and walk["pos0"] == 0, f"a walk folds, from the root on: {item}"
            assert item["row_lo"] in of_walk and item["row_lo"] + item["row_n"] - 1 in of_walk, f"rows of no walk: {item}"
        else:
            walk = item
        group = np.cumsum(opens) - 1
        for r in range(item["row_lo"], item["row_lo"] + item["row_n"]):
            seen = out[r]
            for g in range(1 if fold else group[-1] + 1):
                key = key_of(walk if follows else item, g, r)
                assert follows == (key in seen), f"row {r} writes slot {key} twice, or goes on with nothing"
                seen.setdefault(key, ([], []))
            for seg, first, g, opened in zip(part, start, group, opens, strict=True):
                n = min(int(seg["count"]), int(pos[perm[r]]) - int(first) + 1)
                if n <= 0:
                    continue
                g = 0 if fold else g
                slots, begins = seen[key_of(walk if follows else item, g, r)]
                slot = int(seg["page"]) * page_size + int(seg["offset"])
                slots += range(slot, slot + n)
                if opened:
                    begins.append(int(first))
    return out


def check_coverage(plan: Plan, expected: Sequence[RowView]) -> None:
    """Assert that row i of the plan (caller's order) reads exactly `expected[i]`.

    Every token once, merged from the root to the leaf; a partial begins at each node's start and each 512th
    token of a node, unless the plan folds; partial slots are disjoint, all merged, and below the header's count; queues cover the
    items.
    """
    rows = plan.num_rows
    assert rows == len(expected), f"{rows} rows, {len(expected)} expected"
    perm = plan.section(at.ROW_PERM)
    assert np.array_equal(np.sort(perm), np.arange(rows)), "row_perm is no permutation"
    queues = plan.section(at.WORKER_INDPTR)
    assert queues[0] == 0 and (np.diff(queues) >= 0).all() and queues[-1] == len(plan.section(at.ITEMS)), (
        "queues"
    )
    indptr, merge = plan.section(at.MERGE_INDPTR), plan.section(at.MERGE_SLOTS)
    assert indptr[0] == 0 and (np.diff(indptr) >= 0).all() and indptr[-1] == len(merge), "merge_indptr"
    owner: dict[int, int] = {}
    for r, seen in enumerate(_read(plan)):
        want = expected[perm[r]]
        order = merge[indptr[r] : indptr[r + 1]].tolist() or [-1]
        assert sorted(order) == sorted(seen), f"row {r} merges {order}, its items write {sorted(seen)}"
        for slot in order:
            assert slot < plan.buffer[at.NUM_SLOTS], f"slot {slot} is past the header's count"
            assert slot < 0 or owner.setdefault(slot, r) == r, f"rows {owner[slot]} and {r} share slot {slot}"
        slots = [s for key in order for s in seen[key][0]]
        begins = [b for key in order for b in seen[key][1]]
        assert slots == want.slots.tolist(), f"row {perm[r]}: reads {slots}, expected {want.slots.tolist()}"
        if not plan.folds:
            assert begins == want.begins.tolist(), f"row {perm[r]}: partials at {begins}, expected {want.begins.tolist()}"
    assert len(owner) == plan.buffer[at.NUM_SLOTS], "a slot has no merge"
    followers = int(np.count_nonzero(plan.section(at.ITEMS)["flags"] & at.FOLLOWS))
    assert followers == plan.buffer[at.FOLLOWERS], "another number of followers in the header"
