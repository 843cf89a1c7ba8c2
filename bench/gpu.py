"""What runs on a rented GPU: tests, and benchmarks with cold and warm caches, each part under nine minutes.

    make gpu PART=tests|attention|decode|prm
    python bench/gpu.py attention --tiny        a dry run: smallest sizes, the interpreter if there is no GPU

Cases that a former run did not finish come first. Results are written after every case to
`<out>/gpu-<part>.json`: median, p20 and p80 in microseconds of CUDA-graph replays, with the second-level cache cleared
before each (cold) and not (warm), and percent of the tree roofline: max(unique bytes / this run's copy bandwidth,
flops / 600 TFLOP/s), cold. A dry run times nothing. Needs no network and nothing outside of the repository.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from ttskernels.kv import HeadShape, PagePool, plan_from_parents  # noqa: E402
from ttskernels.kv.machines import gpu_machine  # noqa: E402
from ttskernels.models.config import DecoderConfig  # noqa: E402
from ttskernels.models.decoder import PythonDecoder  # noqa: E402
from ttskernels.ops.step_score import step_score  # noqa: E402
from ttskernels.ops.tree_attention import tree_attention  # noqa: E402
from ttskernels.roofline import SHAPES, Shape  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float16  # the interpreter's bf16 products are wrong
FLOPS = 600e12
# (nodes, tokens of each) a level; tokens but the last level's are whole pages, so that flat paths are page lists.
TREES = {
    "prompt 2048, 64 branches of 128": [(1, 2048), (64, 128)],
    "search, 64 branches": [(1, 1024), (4, 80), (16, 80), (64, 40)],
    "prompt 8192, 256 branches of 256": [(1, 8192), (256, 256)],
    "fan-out 1 > 4 > 256": [(1, 16), (4, 256), (256, 32)],
    "nothing shared": [(64, 1024)],
    "one branch": [(1, 8192)],
}
HEADS = [(32, 8, 128), (28, 4, 128), (12, 2, 128), (14, 2, 64), (32, 32, 128), (16, 1, 128)]
TINY_TREES, TINY_HEADS = {"tiny": [(1, 32), (2, 16), (4, 5)]}, [(4, 2, 64)]
TINY_SHAPE = Shape("tiny", 1, 4, 2, 64, 64, 96, 131)


def paths_of(levels, flat: bool):
    """(parent, length, page_indptr, pages, row_node, row_pos): the tree, or each path as a root of its own."""
    parent, length, pages, first, nodes = [], [], [], 0, []
    for i, (count, tokens) in enumerate(levels):
        above = nodes
        nodes = []
        for j in range(count):
            nodes.append(len(parent))
            parent.append(-1 if i == 0 else above[j // (count // len(above))])
            length.append(tokens)
            pages.append(list(range(first, first + -(-tokens // 16))))
            first += len(pages[-1])
    depth = sum(tokens for _, tokens in levels)
    if flat:
        assert all(tokens % 16 == 0 for _, tokens in levels[:-1])
        chains = []
        for leaf in nodes:
            chain, at = [], leaf
            while at >= 0:
                chain, at = pages[at] + chain, parent[at]
            chains.append(chain)
        parent, length, pages, nodes = [-1] * len(nodes), [depth] * len(nodes), chains, list(range(len(nodes)))
    indptr = [0]
    for part in pages:
        indptr.append(indptr[-1] + len(part))
    return parent, length, indptr, [p for part in pages for p in part], nodes, [depth - 1] * len(nodes), first


def plan_of(levels, heads: HeadShape, flat: bool = False, decode: bool = False):
    """The plan, and the pool pages it needs. `decode`: the queries' own tokens get their K and V written."""
    parent, length, indptr, pages, row_node, row_pos, used = paths_of(levels, flat)
    cached = list(length)
    for node in row_node:
        cached[node] -= decode
    plan = plan_from_parents(parent, length, indptr, pages, row_node, row_pos, heads, cached=cached,
                             machine=gpu_machine(heads))  # fmt: skip
    return plan, used


def measure(work) -> dict:
    """Median, p20, p80 in us of graph replays, cold and warm; {} on a dry run, after running once."""
    work()
    if not GPU:
        return {}
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    clear = torch.empty(1 << 28, dtype=torch.int8, device=DEVICE)
    out = {}
    for state in ("cold", "warm"):
        times = []
        for _ in range(40):
            if state == "cold":
                clear.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        times.sort()
        out[state] = {"median_us": statistics.median(times), "p20_us": times[8], "p80_us": times[32]}
    return out


def copy_bandwidth() -> float:
    """Bytes per second of a large copy, read and written."""
    if not GPU:
        return 1e9
    a = torch.empty(1 << 30, dtype=torch.int8, device=DEVICE)
    b = torch.empty_like(a)
    return 2 * a.numel() / (measure(lambda: b.copy_(a))["warm"]["median_us"] * 1e-6)


def attention_cases(tiny: bool) -> dict:
    def case(levels, q_heads, kv_heads, dim, kv):
        heads = HeadShape(q_heads, kv_heads, dim, dim, kv.itemsize)
        _, pages = plan_of(levels, heads)
        k, v = (torch.randn(pages, 16, kv_heads, dim, device=DEVICE, dtype=DTYPE).to(kv) for _ in range(2))
        q = torch.randn(levels[-1][0], q_heads, dim, device=DEVICE, dtype=DTYPE)
        line, outs = {}, []
        for name in ("tree", "flat"):
            plan = plan_of(levels, heads, flat=name == "flat")[0]
            stats, on_device = plan.stats(), plan.to(DEVICE)
            outs.append(tree_attention(q, k, v, on_device, impl="triton"))
            line[name] = measure(lambda plan=on_device: tree_attention(q, k, v, plan, impl="triton"))
            if name == "tree":
                unique = stats.unique_tokens * 2 * kv_heads * dim * kv.itemsize
                flops = 4 * q_heads * dim * stats.flat_tokens
        line["difference"] = (outs[0].float() - outs[1].float()).abs().max().item()
        assert line["difference"] < 0.05, line
        line["floor_us"] = max(unique / copy_bandwidth(), flops / FLOPS) * 1e6
        tokens = sum(t for _, t in levels)
        if kv == DTYPE and GPU and len(q) * tokens * kv_heads * dim < 1 << 31:  # torch's own, on replicated KV
            dense = torch.randn(2, len(q), kv_heads, tokens, dim, device=DEVICE, dtype=DTYPE)
            sdpa = torch.nn.functional.scaled_dot_product_attention
            line["sdpa"] = measure(lambda: sdpa(q[:, :, None], dense[0], dense[1], enable_gqa=True))
        if GPU:
            line["percent_of_roofline"] = 100 * line["floor_us"] / line["tree"]["cold"]["median_us"]
        return line

    return {
        f"{tree}; {q}/{kv}x{d}; {str(dtype).removeprefix('torch.')}": lambda a=(levels, q, kv, d, dtype): case(*a)
        for dtype in (DTYPE, torch.float8_e4m3fn)
        for tree, levels in (TINY_TREES if tiny else TREES).items()
        for q, kv, d in (TINY_HEADS if tiny else HEADS)
    }


def random_decoder(shape: Shape) -> PythonDecoder:
    """A decoder of this shape with random weights."""
    c = DecoderConfig(
        shape.vocab, shape.hidden, shape.layers, shape.q_heads, shape.kv_heads, shape.head_dim, shape.intermediate,
        1e-6, (1e4 ** -(torch.arange(shape.head_dim // 2) / shape.head_dim * 2)).to(DEVICE), 1.0, 1 << 20,
        False, False, False, False, 0, shape.head_dim**-0.5, DTYPE, (), "random",
    )  # fmt: skip
    queries, keys = c.q_heads * c.head_dim, c.kv_heads * c.head_dim
    sizes = {"self_attn.q_proj": (queries, c.hidden), "self_attn.k_proj": (keys, c.hidden),
             "self_attn.v_proj": (keys, c.hidden), "self_attn.o_proj": (c.hidden, queries),
             "mlp.gate_proj": (c.intermediate, c.hidden), "mlp.up_proj": (c.intermediate, c.hidden),
             "mlp.down_proj": (c.hidden, c.intermediate)}  # fmt: skip
    weights = {"model.embed_tokens.weight": (c.vocab, c.hidden), "lm_head.weight": (c.vocab, c.hidden)}
    weights |= {f"model.layers.{i}.{n}.weight": s for i in range(c.layers) for n, s in sizes.items()}
    made = {n: torch.randn(s, device=DEVICE, dtype=DTYPE).mul_(s[1] ** -0.5) for n, s in weights.items()}
    norms = [f"model.layers.{i}.{n}.weight" for i in range(c.layers) for n in ("input_layernorm", "post_attention_layernorm")]
    made |= {n: torch.ones(c.hidden, device=DEVICE, dtype=DTYPE) for n in [*norms, "model.norm.weight"]}
    return PythonDecoder(c, made, "triton")


def decode_cases(tiny: bool) -> dict:
    def case(shape, branches, prompt, suffix):
        decoder, line = random_decoder(shape), {}
        heads = decoder.config.heads
        levels = [(1, prompt), (branches, suffix)]
        _, pages = plan_of(levels, heads)
        pool = PagePool(shape.layers, shape.kv_heads, shape.head_dim, pages, DTYPE, device=DEVICE, strided=True)
        pool.k.normal_(), pool.v.normal_()
        ids = torch.zeros(branches, dtype=torch.int32, device=DEVICE)
        rows = torch.arange(branches, dtype=torch.int32, device=DEVICE)
        for name in ("tree", "flat"):
            if name == "flat" and prompt % 16:
                continue
            plan = plan_of(levels, heads, flat=name == "flat", decode=True)[0].to(DEVICE)
            assert decoder.forward(ids, plan, pool, None, rows, "logits").isfinite().all()
            line[name] = measure(lambda plan=plan: decoder.forward(ids, plan, pool, None, rows, "logits"))
        return line

    names = ["qwen2.5-0.5b", "qwen2.5-1.5b", "llama-3.2-1b", "llama-3.2-3b"]
    shapes = [TINY_SHAPE] if tiny else [SHAPES[n] for n in names]
    sizes = [(3, 32, 5)] if tiny else [(16, 1024, 256), (64, 1024, 256), (256, 1024, 256)]
    return {f"{s.name}; {n} branches of {p} + {t}": lambda a=(s, n, p, t): case(*a) for s in shapes for n, p, t in sizes}


def prm_cases(tiny: bool) -> dict:
    def case(tokens, steps, dim, vocab, inner):
        hidden = torch.randn(tokens, dim, device=DEVICE, dtype=DTYPE)
        rows = torch.arange(steps, dtype=torch.int32, device=DEVICE) * (tokens // steps)
        norm = torch.ones(dim, device=DEVICE, dtype=DTYPE)
        head = {"weight": torch.randn(2, inner or dim, device=DEVICE, dtype=DTYPE)}
        if inner:
            head["inner_weight"] = torch.randn(inner, dim, device=DEVICE, dtype=DTYPE) * dim**-0.5
        mix = torch.tensor([0.0, 1.0], device=DEVICE)
        line = {"step_score": measure(
            lambda: step_score(hidden, rows, norm_weight=norm, mix=mix, impl="triton", **head)
        )}  # fmt: skip
        if not inner:
            lm_head = torch.randn(vocab, dim, device=DEVICE, dtype=DTYPE) * dim**-0.5
            normed = torch.nn.functional.rms_norm
            line["logits_to_keep"] = measure(
                lambda: torch.softmax((normed(hidden[rows.long()], (dim,), norm) @ lm_head.T)[:, :2].float(), -1)
            )
        return line

    sizes = [(20, 4, 64, 131, 0), (20, 4, 64, 0, 48)] if tiny else [
        (8192, 192, 4096, 128256, 0), (8192, 192, 3584, 0, 3584), (8192, 16, 3584, 0, 3584), (49152, 1024, 4096, 128256, 0),
    ]  # fmt: skip
    return {f"{t} tokens, {n} steps, {d} wide, inner {i}": lambda a=(t, n, d, v, i): case(*a) for t, n, d, v, i in sizes}


def run_tests(tiny: bool) -> int:
    """The kernels' tests; on a GPU they run there."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" or not GPU}
    chosen = ["tests/triton/test_sample.py::test_a_row_that_is_not_finite"] if tiny else ["tests/triton"]
    command = [sys.executable, "-m", "pytest", "-q", *chosen]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("tests", "attention", "decode", "prm"))
    parser.add_argument("--tiny", action="store_true", help="smallest sizes: does it run?")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--minutes", type=float, default=8.5)
    args = parser.parse_args()
    if args.part == "tests":
        return run_tests(args.tiny)
    if not GPU and not args.tiny:
        parser.error("no GPU is visible to torch; --tiny runs the smallest sizes in the interpreter")
    deadline = time.monotonic() + args.minutes * 60
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"gpu-{args.part}{'-dry-run' if args.tiny else ''}.json"
    cases = {"attention": attention_cases, "decode": decode_cases, "prm": prm_cases}[args.part](args.tiny)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    head = {
        "device": torch.cuda.get_device_name() if GPU else "none (interpreter)",
        "torch": torch.__version__,
        "commit": commit.strip(),
        "copy_gb_per_second": copy_bandwidth() / 1e9 if GPU else None,
    }
    former = json.loads(path.read_text()) if path.exists() else {}
    done = former.get("cases", {}) if former.get("commit") == head["commit"] else {}
    left = sorted(cases, key=lambda name: name in done)  # unfinished ones first, otherwise in order
    for name in left:
        if time.monotonic() > deadline:
            print(f"out of time: {sum(n not in done for n in cases)} cases left; run again")
            break
        done[name] = cases[name]()
        path.write_text(json.dumps(head | {"cases": done}, indent=1) + "\n")
        figures = {k: f"{v['cold']['median_us']:.1f} us" for k, v in done[name].items() if isinstance(v, dict) and v}
        print(name, figures or "ran", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
