"""Tree attention against its roofline, our own flat mode, and torch's and FlashInfer's attention."""

from __future__ import annotations

import gc
import time

import torch
from gpu_measure import DEVICE, DTYPE, FLOPS, GPU, Timing, attempt, copies_for, copy_bandwidth, measure
from gpu_trees import FASTTREE, FASTTREE_HEADS, OUR_HEADS, PAGE, PAT, PAT_HEADS, Tree, of_levels, of_text, ours

from ttskernels.kv import HeadShape
from ttskernels.ops.tree_attention import tree_attention

ROOM_BYTES = 24 << 30  # of replicated KV, for rivals that need it
FLEX_TREES = ("beam 64, prompt 1024", "prompt 2048, 64 branches of 128", "FastTree 1,16,64 1024,256,32")
TINY = {"tiny": of_levels([(1, 33), (2, 16), (4, 5)])}


def cases(tiny: bool) -> dict:
    """Name -> function that gives a row. Search trees first, then FastTree's, then PAT's, then other heads and float8."""
    bandwidth = copy_bandwidth()
    dtypes, float8 = (DTYPE,), (torch.float8_e4m3fn,)
    fast, pat = ({t: of_text(t) for t in texts} for texts in (FASTTREE, PAT))
    chosen = [("", TINY, [(4, 2, 64)], dtypes + float8)]
    if not tiny:
        chosen = [
            ("", ours(), OUR_HEADS[:1], dtypes), ("FastTree ", fast, FASTTREE_HEADS[:1], dtypes),
            ("PAT ", pat, PAT_HEADS[:1], dtypes), ("", ours(), OUR_HEADS[1:], dtypes), ("", ours(), OUR_HEADS[:1], float8),
            ("FastTree ", fast, FASTTREE_HEADS[1:], dtypes), ("PAT ", pat, PAT_HEADS[1:], dtypes),
        ]  # fmt: skip
    made, late = {}, {}
    for source, trees, all_heads, kinds in chosen:
        for heads in all_heads:
            for dtype in kinds:
                for name, tree in trees.items():
                    key = f"{source}{name}; {heads[0]}/{heads[1]} x {heads[2]}; {str(dtype).removeprefix('torch.')}"
                    made[key] = lambda a=(tree, heads, dtype, bandwidth): case(*a)
                    if dtype == DTYPE and (tiny or (heads == (32, 8, 128) and source + name in FLEX_TREES)):
                        late[f"{key}; FlexAttention"] = lambda a=(tree, heads): rival_case("flex_attention", *a)
                    for backend in ("auto", "fa2") if dtype == DTYPE else ():
                        late[f"{key}; FlashInfer {backend}"] = lambda a=(tree, heads, backend): rival_case("flashinfer", *a)
    return made | late  # both compile for minutes at first


def case(tree: Tree, sizes: tuple[int, int, int], kv_dtype: torch.dtype, bandwidth: float) -> dict:
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
    q_heads, kv_heads, dim = sizes
    heads = HeadShape(q_heads, kv_heads, dim, dim, kv_dtype.itemsize)
    start = time.perf_counter()
    plan = tree.plan(heads)
    row = {"plan_us": (time.perf_counter() - start) * 1e6}
    stats = plan.stats()
    unique = stats.unique_tokens * 2 * kv_heads * dim * kv_dtype.itemsize
    copies = copies_for(unique)
    q, k, v = inputs(tree, sizes, kv_dtype, copies)
    outs = {}
    # Scattered pages are gathered by index, others may be read as boxes (TMA): the one figure beside the other.
    plans = {"tree": plan, "flat": tree.plan(heads, flat=True), "tree_scattered": tree.plan(heads, scattered=True)}
    for name, host_plan in plans.items():
        on_device = host_plan.to(DEVICE)

        def work(i, on_device=on_device):
            return tree_attention(q[i], k[i], v[i], on_device, impl="triton")

        outs[name] = work(0).float()
        row[name] = measure(work, copies)
    row["max_difference"] = (outs["tree"] - outs["flat"]).abs().max().item()
    row["flat_kv_ratio"] = stats.flat_tokens / stats.unique_tokens
    row["floor_us"] = max(unique / bandwidth, 4 * q_heads * dim * stats.flat_tokens / FLOPS) * 1e6
    if GPU:
        row |= judge(row)
    if kv_dtype == DTYPE:
        row["torch_sdpa"] = attempt(lambda: sdpa(tree, q, k, v, outs["tree"]))
    if row["max_difference"] > 0.05:
        row["failed"] = "tree and flat differ"
    return row


def inputs(tree: Tree, sizes: tuple[int, int, int], kv_dtype: torch.dtype, copies: int) -> tuple:
    """Random q `[copies, rows, q_heads, dim]` and pools `[copies, pages, 16, kv_heads, dim]`."""
    q_heads, kv_heads, dim = sizes
    k, v = (torch.empty(copies, tree.first_page[-1], PAGE, kv_heads, dim, device=DEVICE, dtype=kv_dtype) for _ in range(2))
    for pool in (k, v):
        for i in range(copies):
            pool[i] = torch.randn(pool.shape[1:], device=DEVICE, dtype=DTYPE).to(kv_dtype)
    return torch.randn(copies, len(tree.leaves), q_heads, dim, device=DEVICE, dtype=DTYPE), k, v


def rival_case(name: str, tree: Tree, sizes: tuple[int, int, int], backend: str = "") -> dict:
    """A rival that compiles for minutes, and ours once more beside it."""
    q, k, v = inputs(tree, sizes, DTYPE, copies_for(2 * tree.first_page[-1] * PAGE * sizes[1] * sizes[2] * 2))
    plan = tree.plan(HeadShape(*sizes, sizes[2], DTYPE.itemsize)).to(DEVICE)

    def ours(i):
        return tree_attention(q[i], k[i], v[i], plan, impl="triton")

    expected = ours(0).float()
    if name == "flex_attention":
        return {"tree": measure(ours, len(q)), name: attempt(lambda: flex_attention(tree, q, k, v, expected))}
    cascade = attempt(lambda: flashinfer_cascade(tree, q, k, v, expected, backend))
    row = {"tree": measure(ours, len(q)), f"flashinfer_cascade_{backend}": cascade}
    return row | judge_cascade(tree, row["tree"], cascade)


def judge(row: dict) -> dict:
    """Percent of the roofline, and whether the goal for a floor of this size is met; that of flat decoding is to be never more
    than 3 % slower."""
    floor, cold = row["floor_us"], row["tree"]["cold"]["median_us"]
    percent = 100 * floor / cold
    met = percent >= 80 if floor >= 50 else percent >= 65 if floor >= 10 else cold <= floor + 4
    slower = 100 * (cold / row["flat"]["cold"]["median_us"] - 1)
    return {
        "percent_of_roofline": percent, "goal_met": bool(met), "percent_slower_than_flat": slower, "flat_goal_met": slower <= 3,
    }  # fmt: skip


def judge_cascade(tree: Tree, ours: Timing, cascade: Timing | str) -> dict:
    """How many times faster than FlashInfer's cascade, if both were timed; the goal, for trees of more levels than a prompt and
    its branches, is twice."""
    if not ours or not cascade or isinstance(cascade, str):
        return {}
    times = cascade["cold"]["median_us"] / ours["cold"]["median_us"]
    return {"times_flashinfer": times} | ({"flashinfer_goal_met": times >= 2} if len(tree.levels) > 2 else {})


def check(out: torch.Tensor, expected: torch.Tensor) -> None:
    error = (out.float() - expected).abs().max().item()
    if not error < 0.05:
        raise RuntimeError(f"its result differs from ours by {error:.3g}")


def sdpa(tree: Tree, q, k, v, expected) -> Timing:
    """torch's attention over KV replicated for every query, the query heads of a group folded into rows."""
    copies, rows, q_heads, dim = q.shape
    kv_heads = k.shape[3]
    slots = [tree.slots(leaf) for leaf in tree.leaves]
    longest = max(map(len, slots))
    need = 2 * rows * longest * kv_heads * dim * k.element_size()
    if need > ROOM_BYTES:
        raise MemoryError(f"replicated KV would take {need / 2**30:.0f} GiB")
    copies = min(copies, copies_for(need))
    index = torch.tensor([s + [0] * (longest - len(s)) for s in slots], device=DEVICE)
    mask = None
    if any(len(s) < longest for s in slots):
        lengths = torch.tensor([len(s) for s in slots], device=DEVICE)
        mask = (torch.arange(longest, device=DEVICE) < lengths[:, None])[:, None, None, :]
    dense = [[pool[i].flatten(0, 1)[index].transpose(1, 2).contiguous() for i in range(copies)] for pool in (k, v)]

    def work(i):
        folded = q[i].unflatten(1, (kv_heads, -1))
        return torch.nn.functional.scaled_dot_product_attention(folded, dense[0][i], dense[1][i], attn_mask=mask)

    check(work(0).flatten(1, 2), expected)
    return measure(work, copies)


def flex_attention(tree: Tree, q, k, v, expected) -> Timing:
    """torch's FlexAttention: all queries over the unique KV, a mask saying who descends from which node."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    copies, rows, q_heads, dim = q.shape
    tokens = k.shape[1] * PAGE
    node_of = torch.full((tokens,), len(tree.parent), dtype=torch.long)
    below = torch.zeros(rows, len(tree.parent) + 1, dtype=torch.bool)
    for row, leaf in enumerate(tree.leaves):
        below[row, tree.path(leaf)] = True
    for node, count in enumerate(tree.length):
        node_of[tree.first_page[node] * PAGE :][:count] = node
    node_of, below = node_of.to(DEVICE), below.to(DEVICE)

    def seen(batch, head, row, token):
        return below[row, node_of[token]]

    mask = create_block_mask(seen, None, None, rows, tokens, device=DEVICE)
    run = torch.compile(flex_attention, dynamic=False) if GPU else flex_attention

    def work(i):
        pools = (pool[i].flatten(0, 1).transpose(0, 1)[None] for pool in (k, v))
        return run(q[i].transpose(0, 1)[None], *pools, block_mask=mask, enable_gqa=True)

    check(work(0)[0].transpose(0, 1), expected)
    return measure(work, copies)


def flashinfer_cascade(tree: Tree, q, k, v, expected, backend: str) -> Timing:
    """FlashInfer's multi-level cascade over the same pages, planned once. `auto`: the backend that it chooses, fa3 on Hopper,
    which splits no KV; its fa2 does, which may suit few queries better."""
    from flashinfer import MultiLevelCascadeAttentionWrapper

    copies, rows, q_heads, dim = q.shape
    levels = tree.levels
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
    wrapper = MultiLevelCascadeAttentionWrapper(len(levels), workspace, "NHD")
    for level in wrapper._batch_prefill_wrappers if backend != "auto" else ():
        level._backend = backend
    order = {leaf: row for row, leaf in enumerate(tree.leaves)}
    in_order = torch.tensor([order[leaf] for leaf in levels[-1]], device=DEVICE)  # leaves below one node side by side
    below = {v: 1 for v in tree.leaves}
    for level in reversed(levels[:-1]):
        below |= {v: 0 for v in level}
        for child in below.copy():
            if tree.parent[child] in level:
                below[tree.parent[child]] += below[child]
    rows_of, pages_of, ids, last = [], [], [], []
    for level in levels:
        rows_of.append(_indptr([below[v] for v in level]))
        pages_of.append(_indptr([tree.first_page[v + 1] - tree.first_page[v] for v in level]))
        ids.append(_int32([p for v in level for p in range(tree.first_page[v], tree.first_page[v + 1])]))
        last.append(_int32([(tree.length[v] - 1) % PAGE + 1 for v in level]))
    wrapper.plan(rows_of, pages_of, ids, last, q_heads, k.shape[3], dim, PAGE, q_data_type=DTYPE)
    sorted_q = q[:, in_order].contiguous()

    def work(i):
        return wrapper.run(sorted_q[i], (k[i], v[i]))

    check(work(0), expected[in_order])
    return measure(work, copies)


def _int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def _indptr(counts: list[int]) -> torch.Tensor:
    return torch.nn.functional.pad(_int32(counts).cumsum(0, dtype=torch.int32), (1, 0))
