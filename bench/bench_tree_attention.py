"""Attention over N branches that share a prompt: what sharing and the kernel are worth, per layer.

    pytest bench/bench_tree_attention.py --benchmark-columns=median,iqr,rounds
    TTSK_NUM_THREADS=1 pytest bench/bench_tree_attention.py -k shared

Implementations: `shared` is the plan the engine would run, `flat` reads the prompt for each branch, `gqa`
is torch's SDPA with enable_gqa on replicated KV, `folded` SDPA with the query group folded into q_len,
`flex` FlexAttention over the unique tokens with a tree mask, `reference` the slow PyTorch op (small shape).
extra_info: flops, KV bytes, GFLOP/s, GB/s and their share of the peak (TTSK_PEAK_GFLOPS: fp32 FMA of one
thread, TTSK_PEAK_GBPS: read bandwidth of the machine).
"""

import itertools
import os
import random
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from ttskernels import _dispatch, layout
from ttskernels._reference import tree_attention as reference
from ttskernels.kv import HeadShape, plan_from_parents
from ttskernels.ops.tree_attention import tree_attention

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
from plans import build_plan, make_trees  # noqa: E402

PEAK_GFLOPS = float(os.environ.get("TTSK_PEAK_GFLOPS", 172))  # a Sapphire Rapids core; docs/decisions.md
PEAK_GBPS = float(os.environ.get("TTSK_PEAK_GBPS", 21))
# branches, q heads, kv heads, head dim, prompt tokens, tokens of each branch
SHAPES = {
    "28/4x128": (16, 28, 4, 128, 2048, 128),  # Qwen2.5-7B
    "14/2x64": (16, 14, 2, 64, 2048, 128),  # Qwen2.5-0.5B
    "9/3x64": (16, 9, 3, 64, 2048, 128),  # SmolLM2-135M
    "32/32x64-leaves": (16, 32, 32, 64, 64, 1024),  # almost nothing is shared, one row a KV head: bandwidth
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.fixture
def threads():
    n, before = _dispatch.library().ttsk_num_threads(), torch.get_num_threads()
    torch.set_num_threads(n)
    yield n
    torch.set_num_threads(before)


STEP, WIDTH = 80, 4  # tokens of a reasoning step and children of a survivor, as in searches


def tree_nodes(kind: str, branches: int, prompt: int, suffix: int) -> tuple[list[tuple[int, int]], list[int]]:
    """`(parent, tokens)` of every node, and the leaves.

    "best-of-N": branches behind a prompt. "unshared": a prompt of its own for each. "beam", "dvts": what is left of a search
    of width 4 with `suffix` tokens behind the prompt, in steps of 80, the last one under way. In a beam, survivors are drawn
    from all paths; in DVTS each subtree keeps one. What is not above a leaf was released. Steps have one length, so that
    other methods need no padding.
    """
    if kind == "best-of-N":
        return [(-1, prompt)] + [(0, suffix)] * branches, list(range(1, branches + 1))
    if kind == "unshared":
        return [(-1, prompt + suffix)] * branches, list(range(branches))
    draw, grown, paths = random.Random(0), [(-1, prompt)], [0]
    for done in range(0, suffix, STEP):
        width = branches // len(paths)
        grown += [(parent, min(STEP, suffix - done)) for parent in paths for _ in range(width)]
        paths = list(range(len(grown) - branches, len(grown)))
        if done + STEP >= suffix:
            break
        subtrees = [paths[i : i + WIDTH] for i in range(0, branches, WIDTH)]
        paths = sorted(draw.sample(paths, branches // WIDTH)) if kind == "beam" else [draw.choice(s) for s in subtrees]
    kept = set()
    for node in paths:
        while node >= 0:
            kept.add(node)
            node = grown[node][0]
    number = {node: i for i, node in enumerate(sorted(kept))} | {-1: -1}
    return [(number[grown[n][0]], grown[n][1]) for n in sorted(kept)], [number[n] for n in paths]


class Case:
    def __init__(self, branches, q_heads, kv_heads, dim, prompt, suffix, dtype, shared=True, tree="best-of-N",
                 shuffled=True):  # fmt: skip
        torch.manual_seed(0)
        nodes, leaves = tree_nodes(tree, branches, prompt, suffix)
        rows = [(n, nodes[n][1] - 1) for n in leaves]
        self.trees = make_trees([(*n, 0) for n in nodes], rows, slack=False, shuffled=shuffled)
        self.plan = self.product_plan(HeadShape(q_heads, kv_heads, dim, dim, dtype.itemsize))
        if not shared:
            self.plan = build_plan(self.trees, "pushed")
        self.k, self.v = layout.new_pages(self.trees.num_pages, kv_heads, dim, dtype)
        self.k.normal_(), self.v.normal_()
        self.q = torch.randn(branches, q_heads, dim).to(dtype)
        self.scale = dim**-0.5
        read = sum(tokens for _, tokens in nodes) if shared else branches * (prompt + suffix)
        self.flops = 4 * q_heads * dim * branches * (prompt + suffix)
        self.kv_bytes = 2 * kv_heads * dim * self.q.element_size() * read

    def product_plan(self, heads: HeadShape):
        """What the engine would run: the planner's choice of what is read together."""
        nodes = self.trees.nodes
        bounds = list(itertools.accumulate((len(n.pages) for n in nodes), initial=0))
        return plan_from_parents(
            [n.parent for n in nodes], [n.length for n in nodes], bounds, [p for n in nodes for p in n.pages],
            [node for node, _ in self.trees.rows], [self.trees.position(r) for r in range(len(self.trees.rows))],
            heads, first_offset=[n.offset for n in nodes],
        ).buffer  # fmt: skip

    def dense(self):
        """KV of every branch, replicated: `[branches, kv_heads, tokens, dim]`."""
        kv = reference.visible_kv(self.q, self.k, self.v, self.plan, 0)
        return tuple(torch.stack([pair[i] for pair in kv]).transpose(1, 2).contiguous() for i in (0, 1))

    def unique(self):
        """KV of every token once `[1, kv_heads, tokens, dim]`, and the node of each token."""
        nodes = range(len(self.trees.nodes))
        page, slot = torch.tensor([s for n in nodes for s in self.trees.slots(n)]).T
        owner = torch.cat([torch.full((len(self.trees.slots(n)),), n) for n in nodes])
        k, v = (t[page, slot].transpose(0, 1)[None].contiguous() for t in layout.to_nhd(self.k, self.v))
        return k, v, owner


def measure(benchmark, case, call, threads, **options):
    result = benchmark.pedantic(call, **{"rounds": 7, "warmup_rounds": 2, "iterations": 1, **options})
    benchmark.extra_info |= {"flops": case.flops, "kv_bytes": case.kv_bytes, "threads": threads}
    benchmark.extra_info["isa"] = _dispatch.isa_name()
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median
        gflops, gbps = case.flops / seconds / 1e9, case.kv_bytes / seconds / 1e9
        benchmark.extra_info |= {"gflops": round(gflops, 1), "gbps": round(gbps, 2)}
        benchmark.extra_info["peak_percent"] = round(100 * gflops / PEAK_GFLOPS / threads, 1)
        benchmark.extra_info["bandwidth_percent"] = round(100 * gbps / PEAK_GBPS, 1)
    return result


def flex(case):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    k, v, owner = case.unique()
    branches, tokens = case.q.shape[0], len(owner)

    above = torch.zeros(branches, len(case.trees.nodes), dtype=torch.bool)
    for row, (node, _) in enumerate(case.trees.rows):
        above[row, case.trees.path(node)] = True

    def sees(batch, head, row, token):
        return above[row, owner[token]]

    mask = create_block_mask(sees, None, None, branches, tokens, device="cpu")
    compiled = torch.compile(flex_attention)
    q = case.q.transpose(0, 1)[None].contiguous()

    def call():
        return compiled(q, k, v, block_mask=mask, scale=case.scale, enable_gqa=True)[0].transpose(0, 1)

    return call


@pytest.mark.parametrize("impl", ["shared", "flat", "gqa", "folded", "flex"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bench_tree_attention(benchmark, threads, shape, dtype, impl):
    if benchmark.disabled and (impl == "flex" or "leaves" in shape):
        pytest.skip("compiles or replicates for seconds: timed runs only")
    case = Case(*SHAPES[shape], DTYPES[dtype], shared=impl not in ("flat", "gqa", "folded"))
    benchmark.group = f"tree_attention {shape} {dtype}"
    branches, q_heads, dim = case.q.shape
    if impl in ("shared", "flat"):
        out = measure(
            benchmark, case, lambda: tree_attention(case.q, case.k, case.v, case.plan, impl="cpu"), threads
        )
    elif impl == "flex":
        try:
            call = flex(case)
            call()
        except Exception as error:  # what torch.compile raises differs by version and compiler
            pytest.skip(f"FlexAttention does not run here: {str(error).splitlines()[0][:120]}")
        out = measure(benchmark, case, call, threads)
    else:
        k, v = case.dense()
        kv_heads = k.shape[1]
        q = case.q[:, :, None] if impl == "gqa" else case.q.view(branches, kv_heads, -1, dim)

        def call():
            return F.scaled_dot_product_attention(q, k, v, scale=case.scale, enable_gqa=impl == "gqa")

        out = measure(benchmark, case, call, threads, rounds=3, warmup_rounds=1).reshape(
            branches, q_heads, dim
        )
    row = reference.visible_kv(case.q, case.k, case.v, case.plan, 0)[3]
    group = q_heads // row[0].shape[1]
    k, v = (t.double().repeat_interleave(group, dim=1) for t in row)
    weights = (torch.einsum("hd,thd->ht", case.q[3].double(), k) * case.scale).softmax(1)
    torch.testing.assert_close(out[3].double(), torch.einsum("ht,thd->hd", weights, v), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_bench_small(benchmark, threads, impl):
    """The reference is a definition, not a rival; one small shape says by how much."""
    case = Case(4, 14, 2, 64, 128, 32, torch.bfloat16)
    benchmark.group = "tree_attention small bf16"
    measure(benchmark, case, lambda: tree_attention(case.q, case.k, case.v, case.plan, impl=impl), threads)
