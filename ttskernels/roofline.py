"""What a decode iteration over a tree moves, computes and launches, and the least time that can take on a GPU.

    python -m ttskernels model --shape qwen2.5-7b --branches 64 --prompt 2048 --suffix 128
    python -m ttskernels model --shape llama-3.1-8b --levels 1x1024,4x80,16x80,64x40 --kv-bytes 1
    python -m ttskernels model --nodes 1024,0:80,0:64,1:33,1:40,2:57
    python -m ttskernels model --table

Counts come from the plan the kernels would run; times are floors (bytes / bandwidth, flops / rate), not measurements. The
roofline of an iteration has no time for its launches, which a graph replays one after the other: they are told apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from ttskernels.attention_launches import attention_launches
from ttskernels.kv.machines import DEVICES, H100, Device, gpu_machine
from ttskernels.kv.plan import Plan, plan_from_parents
from ttskernels.kv.plan_layout import ITEMS, HeadShape, section

PAGE = 16
# Calls of a captured decode iteration (models/device_decoder.py), per layer and once: q, k, v and gate, up are one
# product each, o and down add the residual themselves. Each is a launch, attention and sampling up to three and two.
LAYER_CALLS = {"rms_norm": 2, "linear": 4, "rope_append": 1, "tree_attention": 1, "silu_mul": 1}
ITERATION_CALLS = {"embedding": 1, "rms_norm": 1, "linear": 1, "sample": 1, "decode_advance": 1}
SAMPLE_LAUNCHES = 2


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder; weights in bf16."""

    name: str
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocab: int

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            if name != "name" and size < 1:
                raise ValueError(f"{name} of a shape must be positive, got {size}")

    @property
    def weights(self) -> int:
        """Elements that an iteration multiplies by; of the embedding table only a tied head's reading counts."""
        heads = self.hidden * self.head_dim * (2 * self.q_heads + 2 * self.kv_heads)
        return self.layers * (heads + 3 * self.hidden * self.intermediate) + self.hidden * self.vocab

    @property
    def weight_bytes(self) -> int:
        return 2 * self.weights


SHAPES = {
    s.name: s
    for s in (
        Shape("qwen2.5-0.5b", 24, 14, 2, 64, 896, 4864, 151936),
        Shape("qwen2.5-1.5b", 28, 12, 2, 128, 1536, 8960, 151936),
        Shape("qwen2.5-7b", 28, 28, 4, 128, 3584, 18944, 152064),
        Shape("llama-3.2-1b", 16, 32, 8, 64, 2048, 8192, 128256),
        Shape("llama-3.2-3b", 28, 24, 8, 128, 3072, 8192, 128256),
        Shape("llama-3.1-8b", 32, 32, 8, 128, 4096, 14336, 128256),
        Shape("llama-2-7b", 32, 32, 32, 128, 4096, 11008, 32000),
    )
}
# (shape, branches, prompt, suffix, bytes of a KV element): the rows of `--table`.
TABLE = [
    ("qwen2.5-1.5b", 64, 2048, 128, 2),
    ("qwen2.5-7b", 64, 2048, 128, 2),
    ("qwen2.5-7b", 256, 8192, 256, 2),
    ("llama-3.1-8b", 64, 1024, 512, 2),
    ("llama-3.1-8b", 64, 2048, 128, 2),
    ("llama-3.1-8b", 256, 8192, 256, 2),
    ("llama-3.1-8b", 256, 8192, 256, 1),
    ("llama-2-7b", 256, 8192, 256, 2),
]


@dataclass(frozen=True)
class Expectation:
    """One iteration, one query a branch. The fields down to gain are of one layer's attention."""

    flat_us: float  # every branch reads its whole path
    shared_us: float  # every node is read once
    flat_bytes: int
    shared_bytes: int
    compute_us: float
    floor_us: float
    gain: float  # flat_us / floor_us
    plan_read_us: float  # what the plan's items read, a node of several blocks of rows more than once
    plan_partial_us: float  # partial results, written and read
    plan_items: int
    launches: int  # of the whole iteration
    launch_us: float  # of those that wait for the one in front
    weights_us: float  # read once, or their arithmetic
    logits_us: float  # float32, written and read
    iteration_us: float  # the roofline: weights, attention of every layer, logits
    launched_iteration_us: float  # and launches
    flat_iteration_us: float  # with flat attention, launches included
    kv_bytes: int  # of the whole tree, all layers


class Tree(NamedTuple):
    """Parent (-1: none) and tokens of every node, parents first. The ends of nodes without children are the queries."""

    parent: list[int]
    length: list[int]


def tree_of_levels(levels: Sequence[tuple[int, int]]) -> Tree:
    """`(nodes, tokens of each)` from the roots down; the nodes of a level are spread evenly below those above it."""
    tree, first = Tree([], []), 0
    for i, (count, tokens) in enumerate(levels):
        above = levels[i - 1][0] if i else 0
        if tokens < 1 or count < max(1, above):
            raise ValueError(
                f"level {i} must have at least the {max(1, above)} nodes of the level above and a token each, "
                f"got {count} of {tokens}"
            )
        tree.parent.extend(first + j * above // count if i else -1 for j in range(count))
        tree.length.extend([tokens] * count)
        first += above
    return tree


def plan_of_tree(tree: Tree, heads: HeadShape, device: Device) -> Plan:
    """The plan of one query at the end of each node without children."""
    end, indptr = [], [0]
    for i, (parent, tokens) in enumerate(zip(*tree, strict=True)):
        if not -1 <= parent < i or tokens < 1:
            raise ValueError(
                f"node {i} must have a node in front of it as parent, or none, and a token, got {parent} and {tokens}"
            )
        end.append(tokens + (end[parent] if parent >= 0 else 0))
        indptr.append(indptr[-1] - (-tokens // PAGE))
    leaves = sorted(set(range(len(end))) - set(tree.parent))
    return plan_from_parents(
        tree.parent, tree.length, indptr, range(indptr[-1]), leaves, [end[leaf] - 1 for leaf in leaves], heads,
        page_size=PAGE, machine=gpu_machine(heads, device),
    )  # fmt: skip


def expect(shape: Shape, tree: Tree | Sequence[tuple[int, int]], kv_bytes: int = 2, device: Device = H100) -> Expectation:
    """The model of one decode iteration.

    Args:
        tree: a `Tree`, or `(nodes, tokens of each)` of its levels from the roots down.
        kv_bytes: of one stored K or V element: 2 for bf16, 1 for float8.
    Raises:
        ValueError: what makes no tree.
    """
    heads = HeadShape(shape.q_heads, shape.kv_heads, shape.head_dim, shape.head_dim, kv_bytes)
    plan = plan_of_tree(tree if isinstance(tree, Tree) else tree_of_levels(tree), heads, device)
    stats, token_bytes = plan.stats(), 2 * shape.kv_heads * shape.head_dim * kv_bytes
    second = 1e6 / device.bytes_per_second
    flat, shared = stats.flat_tokens * token_bytes * second, stats.unique_tokens * token_bytes * second
    compute = 4 * shape.q_heads * shape.head_dim * stats.flat_tokens / device.flops_per_second * 1e6
    floor = max(shared, compute)
    items = section(plan.buffer.numpy(), ITEMS)
    read = int(items["tokens"].sum()) * token_bytes * second
    partial = stats.partial_slots * shape.q_heads * (shape.head_dim + 2) * 8 * second
    in_turn = shape.layers * sum(LAYER_CALLS.values()) + sum(ITERATION_CALLS.values()) + SAMPLE_LAUNCHES - 1
    attention = attention_launches(plan.header)
    launches = in_turn + shape.layers * (attention.large + attention.small + attention.merge - 1)
    launch_us = (in_turn if device.early_launches else launches) * device.launch_us
    products = 2 * shape.weights * plan.num_rows / device.flops_per_second * 1e6
    weights = max(shape.weight_bytes * second, products)
    logits = 2 * 4 * shape.vocab * plan.num_rows * second
    fixed = weights + logits
    return Expectation(
        flat_us=flat, shared_us=shared, compute_us=compute, floor_us=floor, gain=flat / floor,
        flat_bytes=stats.flat_tokens * token_bytes, shared_bytes=stats.unique_tokens * token_bytes,
        plan_read_us=read, plan_partial_us=partial, plan_items=len(items),
        launches=launches, launch_us=launch_us, weights_us=weights, logits_us=logits,
        iteration_us=fixed + shape.layers * floor, launched_iteration_us=fixed + shape.layers * floor + launch_us,
        flat_iteration_us=fixed + shape.layers * flat + launch_us,
        kv_bytes=stats.unique_tokens * token_bytes * shape.layers,
    )  # fmt: skip


def parse_levels(text: str) -> list[tuple[int, int]]:
    """`1x2048,64x128` -> [(1, 2048), (64, 128)]."""
    try:
        return [(int(n), int(t)) for n, t in (part.split("x") for part in text.split(","))]
    except ValueError:
        raise ValueError(f"--levels must look like 1x2048,64x128 (nodes x tokens, from the root), got {text!r}") from None


def parse_nodes(text: str) -> Tree:
    """`1024,0:80,0:64` -> a root of 1024 tokens and two nodes below it."""
    try:
        pairs = [part.rpartition(":")[::2] for part in text.split(",")]
        return Tree([int(parent) if parent else -1 for parent, _ in pairs], [int(tokens) for _, tokens in pairs])
    except ValueError:
        raise ValueError(f"--nodes must look like 1024,0:80,0:64 (parent:tokens, roots without parent), got {text!r}") from None


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m ttskernels model", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen2.5-7b")
    for field in fields(Shape)[1:]:
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, help=f"instead of the shape's {field.name}")
    parser.add_argument("--branches", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--suffix", type=int, default=128)
    parser.add_argument("--levels", help="nodes x tokens of each level, instead of the three above")
    parser.add_argument("--nodes", help="parent:tokens of each node, instead of those; the ends of the tree are the branches")
    parser.add_argument("--kv-bytes", type=int, choices=(1, 2), default=2)
    parser.add_argument("--device", choices=sorted(DEVICES), default="h100")
    parser.add_argument("--gb-per-second", type=float, help="a bandwidth that was measured, instead of the device's")
    parser.add_argument("--table", action="store_true", help="a table of shapes and trees")
    args = parser.parse_args(argv)
    device = DEVICES[args.device]
    if args.gb_per_second is not None:
        if not args.gb_per_second > 0:
            parser.error(f"--gb-per-second must be positive, got {args.gb_per_second}")
        device = replace(device, bytes_per_second=args.gb_per_second * 1e9)
    if args.table:
        print(f"{'shape':14}{'N,P,S':>15} {'KV':>3} {'flat':>9}{'shared':>9}{'compute':>9}{'floor':>9}{'gain':>7}"
              f"{'iteration':>11}{'launches':>10}  us a layer on {device.name}, then us an iteration")  # fmt: skip
        for name, n, p, s, kv in TABLE:
            e = expect(SHAPES[name], [(1, p), (n, s)], kv, device)
            print(f"{name:14}{f'{n},{p},{s}':>15} {kv:>3} {e.flat_us:9.1f}{e.shared_us:9.1f}{e.compute_us:9.1f}"
                  f"{e.floor_us:9.1f}{e.gain:7.1f}{e.iteration_us:11.0f}{e.launch_us:10.0f}")  # fmt: skip
        return 0
    given = {f.name: getattr(args, f.name) for f in fields(Shape)[1:] if getattr(args, f.name) is not None}
    try:
        shape = Shape(**{**vars(SHAPES[args.shape]), **given})
        if args.nodes:
            tree = parse_nodes(args.nodes)
            text = f"{len(tree.parent)} nodes of {sum(tree.length)} tokens"
        else:
            levels = parse_levels(args.levels) if args.levels else [(1, args.prompt), (args.branches, args.suffix)]
            tree, text = tree_of_levels(levels), " > ".join(f"{n} x {t}" for n, t in levels) + " tokens"
        e = expect(shape, tree, args.kv_bytes, device)
    except ValueError as error:
        parser.error(str(error))
    rows = [
        ("attention, one layer", ""),
        ("  flat (each path read)", f"{e.flat_us:.1f} us, {e.flat_bytes / 1e6:.1f} MB"),
        ("  each node read once", f"{e.shared_us:.1f} us, {e.shared_bytes / 1e6:.1f} MB"),
        ("  arithmetic", f"{e.compute_us:.1f} us"),
        ("  floor", f"{e.floor_us:.1f} us, {e.gain:.1f} times below flat"),
        ("  the plan reads", f"{e.plan_read_us:.1f} us in {e.plan_items} items, {e.plan_partial_us:.2f} us of partials"),
        ("one decode iteration", ""),
        ("  weights", f"{e.weights_us:.0f} us, {shape.weight_bytes / 1e6:.0f} MB"),
        ("  logits", f"{e.logits_us:.0f} us"),
        ("  roofline", f"{e.iteration_us:.0f} us"),
        ("  launches", f"{e.launches}, {e.launch_us:.0f} us inside a graph"),
        ("  with launches", f"{e.launched_iteration_us:.0f} us ({e.flat_iteration_us:.0f} with flat attention)"),
        ("KV of the tree", f"{e.kv_bytes / 2**30:.2f} GiB"),
    ]
    name = "a shape of your own" if given else shape.name
    print(f"{name} on {device.name}, {text}, {args.kv_bytes} bytes a KV element. Floors, not measurements.")
    for name, value in rows:
        print(f"{name:26}{value}")
    return 0
