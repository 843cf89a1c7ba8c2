"""PRM scoring in step search: incremental and fused, beside the ways others do it.

Why: N paths grow by K steps of L tokens behind a problem of P tokens, and a process reward model scores every new step.
Scored anew each time that is N (K P + L K (K + 1) / 2) tokens; only the new ones are P + N K L. The PRM has the shape of
SmolLM2-135M (30 layers, 576 wide, 9 / 3 heads), random weights, and two vocabulary rows for a head (as Math-Shepherd's),
in bf16 everywhere. Methods:

    ours        this engine: only new tokens, the fused head
    no_reuse    (c) this engine, every path from its first token
    full        (a) transformers, `model(ids).logits[:, :, rows]` over the whole batch, as published PRM code does
    keep        (b) transformers, `logits_to_keep` = the positions that are read
    cache       (d) transformers by hand: the problem prefilled once, its DynamicCache expanded to N, then new tokens only,
                `logits_to_keep` = the last one

    python bench/prm_scoring.py time --steps 1:20 --out bench/results/prm_scoring.json
    python bench/prm_scoring.py memory --vocab 49152 --out bench/results/prm_scoring.json     (and with 152064)
    python bench/prm_scoring.py report --out bench/results/prm_scoring.json

`time` interleaves the methods step by step and adds each step to the file as it is done, so a run may be cut into parts
(`--steps 1:8`, then `--steps 9:14`, ..; ours and cache first catch up, untimed) or some methods measured at some steps only:
the report has each method's own steps and compares with ours over the same ones. `--rounds` repeats ours and cache, each
round with a state of its own. `memory` runs each method in a process of its own: how far the peak resident set (VmHWM,
reset once the model is loaded) is above what was resident then, KV included: over the last and largest step for `full`,
`keep` and `no_reuse`, over all steps for `ours` and `cache`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import ttskernels
from ttskernels.engine.batcher import Engine
from ttskernels.models import load_model
from ttskernels.models.heads import HeadSpec

METHODS = ("ours", "no_reuse", "full", "keep", "cache")
GROWING = ("ours", "cache")  # keep a state from step to step
ROWS = (648, 387)  # good, bad
ROOT = Path(__file__).parent.parent


class Work:
    """The tokens: a problem, and N paths of K steps."""

    def __init__(self, args):
        draw = torch.Generator().manual_seed(0)
        self.problem = torch.randint(10, args.vocab, (args.problem,), generator=draw)
        self.steps = torch.randint(10, args.vocab, (args.paths, args.num_steps, args.length), generator=draw)
        self.paths, self.length = args.paths, args.length

    def whole(self, k: int) -> torch.Tensor:
        """`[N, P + k L]`: everything up to and including step k (from 1)."""
        return torch.cat([self.problem.expand(self.paths, -1), self.steps[:, :k].flatten(1)], 1)

    def ends(self, k: int) -> torch.Tensor:
        return len(self.problem) + self.length * torch.arange(1, k + 1) - 1


ROOM = 4 << 30  # bytes of KV: a round's state comes to 454 MiB, and what did not fit would be evicted and computed again


class Ours:
    def __init__(self, folder: Path, work: Work, engine: Engine | None = None, reuse: bool = True):
        head = HeadSpec(rows=ROWS, squash="softmax", mix=(1.0, 0.0))
        self.engine = engine or Engine(None, load_model(folder, torch.bfloat16, head=head), kv_bytes=ROOM)
        self.work, self.reuse = work, reuse
        self.session = self.engine.open(None, work.problem.tolist())
        self.nodes = [self.session.verifier_root] * work.paths

    def step(self, k: int) -> list[float]:
        root, jobs = self.session.verifier_root, []
        for i, node in enumerate(self.nodes):
            ids = self.work.steps[i, k - 1].tolist() if self.reuse else self.work.whole(k)[i].tolist()
            jobs.append(self.engine.score(self.session, node, ids, [len(ids) - 1], None if self.reuse else 0))
        done = [job.result() for job in jobs]
        self.engine.release(self.session, verifier=[n for n in self.nodes if n is not root])
        self.nodes = [node for node, _ in done]
        if not self.reuse:
            self.engine.release(self.session, verifier=self.nodes)
            self.nodes = [root] * self.work.paths
        return [scores[0] for _, scores in done]

    @property
    def tokens(self) -> int:
        return self.session.counters.verifier_prefilled

    def close(self) -> None:
        self.engine.close(self.session)


class Transformers:
    """The methods on transformers share a model; `cache` keeps its DynamicCache."""

    def __init__(self, model, work: Work, method: str):
        self.model, self.work, self.method, self.cache, self.tokens = model, work, method, None, 0

    @torch.inference_mode()
    def step(self, k: int) -> list[float]:
        if self.method == "cache":
            logits = self._grow(k)
        else:
            ids = self.work.whole(k)
            self.tokens += ids.numel()
            if self.method == "full":
                logits = self.model(ids).logits[:, :, list(ROWS)][:, self.work.ends(k)]
            else:
                logits = self.model(ids, logits_to_keep=self.work.ends(k)).logits[:, :, list(ROWS)]
        return logits[:, -1].float().softmax(-1)[:, 0].tolist()

    def _grow(self, k: int) -> torch.Tensor:
        if self.cache is None:
            self.cache = self.model(self.work.problem[None], use_cache=True, logits_to_keep=1).past_key_values
            self.cache.batch_repeat_interleave(self.work.paths)
            self.tokens += len(self.work.problem)
        ids = self.work.steps[:, k - 1]
        self.tokens += ids.numel()
        last = torch.tensor([ids.shape[1] - 1])
        return self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=last).logits[:, :, list(ROWS)]

    def close(self) -> None:
        self.cache = None


def write_model(folder: Path, args) -> Path:
    """A random PRM of the asked shape; made once per shape and kept in the folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    target = folder / f"prm-{args.layers}x{args.hidden}-v{args.vocab}"
    if not (target / "model.safetensors").is_file():
        torch.manual_seed(0)
        heads = args.hidden // 64
        config = LlamaConfig(
            vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=args.hidden * 8 // 3, num_hidden_layers=args.layers,
            num_attention_heads=heads, num_key_value_heads=heads // 3, max_position_embeddings=8192, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, eos_token_id=0, bos_token_id=1,
        )  # fmt: skip
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(target)
    return target


def load_transformers(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def make(method: str, folder: Path, work: Work, shared: dict):
    """One method with a fresh state; models are shared."""
    if method in ("ours", "no_reuse"):
        made = Ours(folder, work, shared.get("engine"), method == "ours")
        shared["engine"] = made.engine
        return made
    if "transformers" not in shared:
        shared["transformers"] = load_transformers(folder)
    return Transformers(shared["transformers"], work, method)


def run_time(args, folder: Path, record: dict) -> None:
    work, shared = Work(args), {}
    first, last = map(int, args.steps.split(":"))
    runners = []
    for method in args.methods:
        for number in range(args.rounds if method in GROWING else 1):
            runners.append((method, number, make(method, folder, work, shared)))
    for method in args.methods:
        warm = make(method, folder, work, shared)
        warm.step(1)
        warm.close()
    for k in range(1, first):
        for method, _, runner in runners:
            if method in GROWING:
                runner.step(k)
    print("warm", flush=True)
    for k in range(first, last + 1):
        turn, scores = k % len(runners), {}
        for method, number, runner in runners[turn:] + runners[:turn]:  # nobody is always first
            before = runner.tokens
            started = time.perf_counter()
            got = runner.step(k)
            seconds = time.perf_counter() - started
            scores[method] = got
            entry = record["steps"].setdefault(str(k), {}).setdefault(method, {"seconds": [], "tokens": runner.tokens - before})
            entry["seconds"] = [*entry["seconds"], seconds]
            print(f"step {k:2} {method:9} round {number} {seconds:8.2f} s  {runner.tokens - before:7,} tokens", flush=True)
        reference = scores[args.methods[0]]
        record["largest_score_difference"] = max(
            record.get("largest_score_difference", 0.0),
            *(abs(a - b) for other in scores.values() for a, b in zip(reference, other, strict=True)),
        )
        save(args, record)
    for _, _, runner in runners:
        runner.close()
    if "engine" in shared:
        shared["engine"].shutdown()


def run_memory(args, folder: Path, record: dict) -> None:
    """Every method in a process of its own."""
    for method in args.methods:
        command = [sys.executable, __file__, "child", "--methods", method, "--models", str(folder.parent)]
        for name in ("vocab", "layers", "hidden", "problem", "length", "num_steps", "paths"):
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = json.loads(output.splitlines()[-1])
        record["memory"].setdefault(str(args.vocab), {})[method] = found
        print(f"vocab {args.vocab:,} {method:9} peak {found['peak_bytes'] / 2**20:8.0f} MiB above the loaded model", flush=True)
        save(args, record)


def run_child(args, folder: Path) -> None:
    work, method = Work(args), args.methods[0]
    runner = make(method, folder, work, {})
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    resident = memory("VmRSS")
    for k in range(1, args.num_steps + 1) if method in GROWING else (args.num_steps,):
        runner.step(k)
    kv = runner.engine.budget.peak_bytes if method in ("ours", "no_reuse") else None
    print(json.dumps({"peak_bytes": memory("VmHWM") - resident, "resident_bytes": resident, "kv_bytes": kv}), flush=True)


def memory(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def report(record: dict) -> dict:
    """Totals of each method over the steps that it has; medians over rounds, step by step. Ours beside it over the same ones."""
    steps = record["steps"]
    out = {"steps": {}, "seconds": {}, "tokens": {}, "times_ours": {}, "peak_mib": {}}
    for method in METHODS:
        mine = [step for _, step in sorted(steps.items(), key=lambda item: int(item[0])) if method in step]
        if not mine:
            continue
        spent = [statistics.median(step[method]["seconds"]) for step in mine]
        ours = [statistics.median(step["ours"]["seconds"]) for step in mine if "ours" in step]
        out["steps"][method] = [int(k) for k in sorted(steps, key=int) if method in steps[k]]
        out["seconds"][method], out["tokens"][method] = sum(spent), sum(step[method]["tokens"] for step in mine)
        out["times_ours"][method] = sum(spent) / sum(ours) if len(ours) == len(mine) else None
        times = f"{out['times_ours'][method]:6.2f} x ours" if len(ours) == len(mine) else "(ours not at these steps)"
        print(f"{method:9} {sum(spent):8.1f} s {out['tokens'][method]:9,} tokens over {len(mine):2} steps {times}")
    for vocab, each in record["memory"].items():
        out["peak_mib"][vocab] = {method: round(found["peak_bytes"] / 2**20) for method, found in each.items()}
        print(f"vocab {int(vocab):,}: peak MiB " + ", ".join(f"{m} {v:,}" for m, v in out["peak_mib"][vocab].items()))
    return out


def save(args, record: dict) -> None:
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


def describe(args, record: dict) -> None:
    """Where and how; a file holds parts of one run only."""
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    shape = {name: getattr(args, name) for name in ("layers", "hidden", "problem", "length", "num_steps", "paths")}
    if record.setdefault("shape", shape) != shape:
        raise SystemExit(f"{args.out} holds a run of {record['shape']}, not {shape}; choose another --out")
    model = next((x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), "")
    record.setdefault("bench", "prm_scoring")
    record["device"] = f"{model or platform.machine()}, {torch.get_num_threads()} threads"
    record["isa"], record["commit"] = ttskernels.isa_name(), head.stdout.strip() or "unknown"
    record["versions"] = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    record.setdefault("commands", []).append(" ".join(["python", "bench/prm_scoring.py", *sys.argv[1:]]))
    record.setdefault("steps", {}), record.setdefault("memory", {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("time", "memory", "report", "child"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", default="1:20", help="first:last, from 1")
    parser.add_argument("--rounds", type=int, default=3, help="of ours and cache; the others run once a step")
    parser.add_argument("--problem", type=int, default=150)
    parser.add_argument("--length", type=int, default=50)
    parser.add_argument("--num-steps", type=int, default=20)
    parser.add_argument("--paths", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "ttsk-bench", help="where models are kept")
    parser.add_argument("--out", type=Path, help="results file; parts are added to it")
    args = parser.parse_args()
    record = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    if args.what != "child":
        describe(args, record)
    if args.what == "report":
        print(json.dumps(report(record)))
        return
    folder = write_model(args.models, args)
    if args.what == "child":
        run_child(args, folder)
        return
    {"time": run_time, "memory": run_memory}[args.what](args, folder, record)
    record["report"] = report(record)
    save(args, record)
    print(json.dumps(record["report"]))


if __name__ == "__main__":
    main()
