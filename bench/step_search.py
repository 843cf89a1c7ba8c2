"""Step search beside best-of-N on our own engine: what does guidance cost?

Why: published beam searches take about 20 times the seconds of best-of-N with the same tokens. Here the same two models, the
same prompt of P ids and the same number of decoded tokens are spent three ways, interleaved in one run:

    best_of_n     N paths of S steps, scored once, at their end
    beam_search   N paths, every step scored, the best N / M go on with M children each
    dvts          N / M subtrees of M

A step is T tokens long (`--lengths fixed`: the stop automaton counts), or ends at one of a fixed set of token ids, from `T / 4`
to `3 T` tokens and T on average (`--lengths ragged`). The PRM is the policy's own checkpoint read at two vocabulary rows. Text
is one character a token, so that the verifier reads exactly the policy's tokens. `--demo` runs the shipped models on their own
task instead, `--problems` at a time, with the steps they write.

    python bench/step_search.py --policy SmolLM2-135M-Instruct.Q4_1.gguf --out bench/results/step_search.json
    python bench/step_search.py --demo --n 16 --problems 4 --methods beam_search dvts --speculate off on

Seconds are wall clock of the whole call, prompt included. Shares are of that: the policy's forwards and sampling (decode), the
verifier's (score), planning, other Python of the engine's thread (python), and waiting for the strategy (idle). The last line is
JSON: every run, medians, spread, and each method's seconds over best_of_n's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch

import ttskernels
from ttskernels.engine import batcher, commands, policy, scorer
from ttskernels.engine.batcher import Engine
from ttskernels.models import load_model
from ttskernels.models.heads import HeadSpec

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "python"))

from ttsearch.budget import Budget  # noqa: E402
from ttsearch.demo import policy_path, verifier_path  # noqa: E402
from ttsearch.demo.task import generate_problems  # noqa: E402
from ttsearch.policies.local import AHEAD_ROWS, LocalBackend  # noqa: E402
from ttsearch.policies.lookahead import SPECULATE  # noqa: E402
from ttsearch.run import search  # noqa: E402
from ttsearch.types import Problem  # noqa: E402
from ttsearch.verifiers.session import EngineVerifier  # noqa: E402
from ttsearch.verifiers.text import Extension, PrmPath  # noqa: E402

FIRST = 0x10000  # token id 0 as a character: beyond the surrogates and anything that looks like text
ROWS = (648, 387)  # vocabulary rows of the PRM's "good" and "bad", modulo a smaller vocabulary


def spell(ids) -> str:
    return "".join(chr(FIRST + i) for i in ids)


def read(text: str) -> list[int]:
    return [ord(char) - FIRST for char in text]


class IdPolicy:
    """Text of the policy's side: one character a token."""

    eos_ids = frozenset()

    def __init__(self, vocab: int, tokens: int, ragged: bool):
        self.next_state = (ragged_steps if ragged else fixed_steps)(vocab, tokens).numpy()

    def prompt_ids(self, problem: str) -> list[int]:
        return read(problem)

    def decode(self, ids) -> str:
        return spell(ids)

    def finish_reason(self, state: int, last_id: int) -> str:
        return "step" if state == -1 else "eos"


def fixed_steps(vocab: int, tokens: int) -> torch.Tensor:
    table = torch.arange(1, tokens + 1, dtype=torch.int32)[:, None].expand(-1, vocab).contiguous()
    table[-1] = -1
    return table


def ragged_steps(vocab: int, tokens: int) -> torch.Tensor:
    """Steps that end at random tokens: nobody before T / 4, then with an even chance per token, everybody at 3 T."""
    table = fixed_steps(vocab, 3 * tokens)
    share = 1.2 / (0.75 * tokens)  # of ids; T tokens on average, the cut at 3 T included
    ends = torch.rand(vocab, generator=torch.Generator().manual_seed(0)) < share
    table[tokens // 4 :, ends] = -1
    return table


class IdVerifier:
    """Text of the verifier's side; a step is read at its last token."""

    family = SimpleNamespace(name="last token of a step", read="step")
    stepwise, max_length = False, None

    def start(self, problem: str) -> PrmPath:
        return PrmPath(problem, (), tuple(read(problem)))

    def extend(self, path: PrmPath, steps) -> Extension:
        ids, reads = [], []
        for step in steps:
            ids += read(step)
            reads.append(len(ids) - 1)
        new = PrmPath(path.problem, (*path.steps, *steps), (*path.ids, *ids))
        return Extension(new, len(path.ids), ids, reads, list(range(len(steps))))

    def fits(self, length: int) -> bool:
        return True


class Clock:
    """Seconds and calls of the engine's parts, by wrapping its own functions; nested ones are counted once."""

    def __init__(self, engine: Engine):
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self._stack: list[float] = []
        self._count(engine._policy)
        self._wrap(engine.policy_model, "decode", "decode")
        self._wrap(engine.policy_model, "forward", "decode")
        self._wrap(engine.verifier_model, "forward", "score")
        self._wrap(scorer, "read_scores", "score")
        for module in (policy, scorer):
            self._wrap(module, "build_plan", "planning")
        self._wrap(engine.policy_model, "sample", "decode")
        self._wrap(batcher.Engine, "_turn", "python")
        self._wrap(commands.Commands, "take", "idle")

    def _count(self, runner) -> None:
        """Decode iterations and rows: a forward with a sample is one."""
        self.iterations = self.rows = 0
        decode, drawn = runner.model.decode, runner.model.sample

        def counted(ids, *args):
            done = decode(ids, *args)
            self.iterations, self.rows = self.iterations + done, self.rows + done * len(ids)
            return done

        def counted_sample(logits, rows, *args):
            self.iterations, self.rows = self.iterations + 1, self.rows + len(rows)
            return drawn(logits, rows, *args)

        runner.model.decode, runner.model.sample = counted, counted_sample

    def _wrap(self, owner, name: str, part: str) -> None:
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            started, inner = time.perf_counter(), 0.0
            self._stack.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                inner = self._stack.pop()
                spent = time.perf_counter() - started
                self.seconds[part] = self.seconds.get(part, 0.0) + spent - inner
                self.calls[name] = self.calls.get(name, 0) + 1
                if self._stack:
                    self._stack[-1] += spent

        setattr(owner, name, timed)

    def take(self) -> dict[str, float]:
        taken, self.seconds, self.iterations, self.rows = self.seconds, {}, 0, 0
        return taken

    def take_calls(self) -> dict[str, int]:
        taken, self.calls = self.calls, {}
        return taken


def load(args) -> LocalBackend:
    if args.demo:
        return LocalBackend.load(policy_path(), verifier_path(), kv_bytes=args.kv_gib << 30, keep_prompts=False)
    model = load_model(args.policy, torch.bfloat16)
    rows = tuple(row % model.config.vocab for row in ROWS)
    prm = load_model(args.policy, torch.bfloat16, head=HeadSpec(rows=rows, squash="softmax", mix=(1.0, 0.0)))
    text = IdPolicy(model.config.vocab, args.step_tokens, args.lengths == "ragged")
    engine = Engine(model, prm, next_state=torch.from_numpy(text.next_state), kv_bytes=args.kv_gib << 30)
    return LocalBackend(engine, text, EngineVerifier(engine, IdVerifier(), source=args.policy))


def problems(args, backend: LocalBackend) -> list[Problem]:
    if args.demo:
        return [Problem(p.prompt) for p in generate_problems("dev", args.problems, 0)[-args.problems :]]
    draw = torch.Generator().manual_seed(0)
    vocab = backend.engine.policy_model.config.vocab
    rows = torch.randint(2, vocab - 2, (args.problems, args.prompt), generator=draw)
    return [Problem(spell(row.tolist()), id=str(i)) for i, row in enumerate(rows)]


def run(args, backend: LocalBackend, clock: Clock, method: str, speculate: str, seed: int) -> dict:
    backend.speculate = speculate
    backend.engine.ahead_rows = backend.engine._policy.ahead_rows = 0 if speculate == "off" else AHEAD_ROWS
    longest = args.steps * args.step_tokens * (3 if args.lengths == "ragged" else 1)
    limits = {} if args.demo else dict(max_steps=args.steps, max_tokens=longest, max_step_tokens=longest)
    aggregate = "product" if args.demo else "last"
    budget = Budget(args.n, args.width, temperature=1.0, seed=seed, aggregate=aggregate, vote="weighted", **limits)
    clock.take(), clock.take_calls()
    before = time.thread_time()

    async def everything():
        return await asyncio.gather(*(search(p, backend, method, budget) for p in problems(args, backend)))

    started = time.perf_counter()
    results = asyncio.run(everything())
    seconds = time.perf_counter() - started
    cost = sum((r.cost for r in results[1:]), results[0].cost)
    iterations, rows, parts = clock.iterations, clock.rows, clock.take()
    return {
        "seconds": seconds, "parts": parts, "calls": clock.take_calls(), "strategy_cpu_seconds": time.thread_time() - before,
        "decoded": cost.policy.tokens_decoded, "scored": cost.verifier.tokens_prefilled, "cost": asdict(cost),
        "speculated": cost.policy.tokens_speculated, "iterations": iterations, "rows": rows,
        "paths": sum(len(r.candidates) for r in results),
    }  # fmt: skip


def summary(runs: list[dict]) -> dict:
    seconds = sorted(r["seconds"] for r in runs)
    total = sum(seconds)
    names = sorted({name for r in runs for name in r["parts"]})
    return {
        "rounds": len(runs), "median_seconds": statistics.median(seconds), "min_seconds": seconds[0], "max_seconds": seconds[-1],
        **{name: statistics.median(r[name] for r in runs) for name in ("decoded", "scored", "speculated", "iterations", "rows")},
        "share": {name: sum(r["parts"].get(name, 0.0) for r in runs) / total for name in names},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", help="checkpoint of the policy and of the PRM")
    parser.add_argument("--demo", action="store_true", help="the shipped models and their task instead")
    parser.add_argument("--methods", nargs="+", default=["best_of_n", "beam_search", "dvts"])
    parser.add_argument("--lengths", choices=("fixed", "ragged"), default="fixed")
    parser.add_argument("--speculate", nargs="+", choices=SPECULATE, default=["sure"], help="each method with each of these")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--step-tokens", type=int, default=32)
    parser.add_argument("--problems", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="number, and seed, of the first round: a run may be cut into parts")
    parser.add_argument("--kv-gib", type=int, default=4)
    parser.add_argument("--out", type=Path, help="results file; rounds are added to it")
    args = parser.parse_args()
    if not args.demo and not args.policy:
        parser.error("pass --policy, or --demo")
    backend = load(args)
    clock = Clock(backend.engine)
    record = json.loads(args.out.read_text()) if args.out and args.out.exists() else {"runs": {}}
    runs: dict[str, list[dict]] = record["runs"]
    ways = [(method, how) for method in args.methods for how in (args.speculate if method != "best_of_n" else ["off"])]
    warm = SimpleNamespace(**vars(args) | {"n": 4, "steps": 1, "step_tokens": 4})
    with backend:
        run(warm, backend, clock, "beam_search", "off", seed=1)
        for number in range(args.first, args.first + args.rounds):
            turn = number % len(ways)  # nobody is always first
            for method, how in ways[turn:] + ways[:turn]:
                one = run(args, backend, clock, method, how, seed=number)
                method = f"{method} {how}" if len(args.speculate) > 1 and method != "best_of_n" else method
                runs.setdefault(method, []).append(one)
                parts = "  ".join(f"{name} {seconds:.2f}" for name, seconds in one["parts"].items())
                tokens = f"{one['decoded']:,} decoded, {one['scored']:,} scored"
                print(f"{method:12} {one['seconds']:7.2f} s  {tokens}  {parts}", flush=True)
    table = {method: summary(each) for method, each in runs.items()}
    base = runs.get("best_of_n")
    for method, row in table.items():
        if base:  # round by round: the two ran next to each other
            ratios = sorted(a["seconds"] / b["seconds"] for a, b in zip(runs[method], base, strict=False))
            row["times_best_of_n"] = [statistics.median(ratios), ratios[0], ratios[-1]]
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    record |= {
        "bench": "step_search", "args": {k: str(v) for k, v in vars(args).items()}, "summary": table,
        "isa": ttskernels.isa_name(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(), "commit": head.stdout.strip(),
    }  # fmt: skip
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({"summary": table}))


if __name__ == "__main__":
    main()
