"""Run this engine and what a user would pick instead, interleaved, and print one table a workload.

    python bench/peers/run.py time --workloads W1 W2 --engines "ours bf16" "llama.cpp bf16" --rounds 3 --out FILE.json
    python bench/peers/run.py time --workloads W3 --searches "openvino bf16 / llama.cpp bf16 / steps" --out FILE.json
    python bench/peers/run.py report --out FILE.json --plot sweep.png

`time` loads each side once and runs one side at a time (the others are stopped processes), in rounds that begin with another
side each; every result is written at once, and a second call goes on where the first ended. A side of which one call took
longer than --long seconds is not repeated. `--hold COMMAND` times while `COMMAND sh -c ...` lives, for machines whose use is
negotiated (`--hold "flock bench.lock"`), and lets go of it every --hold-seconds. README.md says what is fair here
and what is not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from floor import Shape
from models import HERE, ROOT, get
from report import report
from roster import ENGINES, Engine, Worker, WorkerError
from search import beam_search
from workloads import WORKLOADS, Workload

STRATEGIES = ("best_of_n", "beam_search", "dvts")


class Results:
    """The results file: written after every run, and read back by the next call."""

    def __init__(self, path: Path):
        self.path = path
        self.record = json.loads(path.read_text()) if path.exists() else {}
        self.record.setdefault("bench", "peers")
        for name, empty in (("commands", []), ("sides", {}), ("runs", []), ("failed", []), ("disturbed", [])):
            self.record.setdefault(name, empty)

    def has(self, workload: str, side: str, round_: int | None = None) -> list[dict]:
        return [
            run for run in self.record["runs"]
            if run["workload"] == workload and run["side"] == side and round_ in (None, run["round"])
        ]  # fmt: skip

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".tmp")
        fresh.write_text(json.dumps(self.record, indent=1) + "\n")
        fresh.rename(self.path)


class Machine:
    """Holds the machine for a few calls at a time: a child of `command` says when it has it, and gives it back at `give`."""

    def __init__(self, command: str | None, seconds: float):
        self.command, self.seconds, self.holder = command, seconds, None

    def take(self) -> None:
        if self.command and not self.holder:
            self.holder = subprocess.Popen(
                [*shlex.split(self.command), "sh", "-c", "echo; cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            self.holder.stdout.readline()
            self.since = time.perf_counter()

    def give(self, after: float = 0.0) -> None:
        """Give it back if it was held for longer than `after` seconds."""
        if self.holder and time.perf_counter() - self.since >= after:
            self.holder.stdin.close()
            self.holder.wait()
            self.holder.stdout.close()
            self.holder = None


def busy_seconds() -> float:
    """CPU seconds of everything on this machine, since it was started."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return (sum(fields[:3]) + sum(fields[5:8])) / os.sysconf("SC_CLK_TCK")  # user, nice, system; interrupts and steal


def others_share(run, workers: list[Worker]) -> tuple[dict, float]:
    """What `run()` gives, and the share of all cores that processes other than `workers` took meanwhile."""
    started, busy, own = time.perf_counter(), busy_seconds(), sum(worker.cpu_seconds() for worker in workers)
    found = run()
    own = sum(worker.cpu_seconds() for worker in workers) - own
    return found, max(0.0, busy_seconds() - busy - own) / (time.perf_counter() - started) / os.cpu_count()


def wait_for_quiet(share: float, patience: float = 20.0) -> None:
    """Wait until everything else takes less than `share` of the cores, or as long as `patience` seconds."""
    end = time.perf_counter() + patience
    while others_share(lambda: time.sleep(1), [])[1] > share and time.perf_counter() < end:
        pass


class Side:
    """One row of a workload's table: `run(round)` gives what is recorded, after `warm()`."""

    def __init__(self, name: str, workload: Workload, workers: dict[str, Worker], bits: str, run, warm):
        self.name, self.workload, self.workers, self.bits, self.run, self.warm = name, workload, workers, bits, run, warm


def samples_side(name: str, workload: Workload, worker: Worker) -> Side:
    def run(round_: int) -> dict:
        # The same prefill alone, on other ids: what of `seconds` is not decoding, measured alike for everybody.
        alone = worker.call("generate", prompts=[workload.prompt_ids(-1 - round_)], samples=1, tokens=1, seed=round_)
        asked = {"prompts": [workload.prompt_ids(round_)], "samples": workload.samples, "tokens": workload.tokens}
        answer = worker.call("generate", **asked, seed=round_)
        sizes = {len(ids) for ids in answer["ids"]}
        if len(answer["ids"]) != workload.samples or sizes != {workload.tokens}:
            raise WorkerError(f"{name} gave {len(answer['ids'])} samples of {sizes} tokens in {workload.name}")
        distinct = len({tuple(ids) for ids in answer.pop("ids")})
        return {**answer, "prefill_alone_seconds": alone["seconds"], "decoded": workload.decoded, "distinct": distinct}

    def warm() -> None:
        few = min(workload.samples, 4)
        worker.call("generate", prompts=[workload.prompt_ids(-99)], samples=few, tokens=min(4, workload.tokens), seed=99)

    return Side(name, workload, {name: worker}, worker.engine.bits, run, warm)


def strategy_side(name: str, workload: Workload, worker: Worker, strategy: str) -> Side:
    def run(round_: int, steps: int = workload.steps) -> dict:
        return worker.call(
            "search", strategy=strategy, prompt=workload.prompt_ids(round_), paths=workload.samples, width=workload.width,
            steps=steps, step_tokens=workload.tokens, seed=round_,
        )  # fmt: skip

    return Side(name, workload, {name: worker}, worker.engine.bits, run, lambda: run(-99, 1))


def search_side(name: str, workload: Workload, policy: Worker, reward: Worker, whole: bool) -> Side:
    def warm() -> None:
        asked = {"prompts": [workload.prompt_ids(-99)], "samples": workload.width, "tokens": 4}
        ids = policy.call("generate", **asked, seed=99)["ids"]
        reward.call("score_begin", prompt=workload.prompt_ids(-99))
        if whole:
            reward.call("score_whole", paths=[workload.prompt_ids(-99)])
        else:
            reward.call("score_steps", parents=[-1] * len(ids), steps=ids)

    def run(round_: int) -> dict:
        return beam_search(policy, reward, workload, round_, whole)

    bits = "bf16" if {policy.engine.bits, reward.engine.bits} == {"bf16"} else "int8"
    return Side(name, workload, {"policy": policy, "reward": reward}, bits, run, warm)


class Cast:
    """Starts workers, each once and with room for the largest of `workloads`, which have one model."""

    def __init__(self, args, results: Results, workloads: list[Workload]):
        self.args, self.results, self.workloads, self.workers = args, results, workloads, {}
        self.refused: dict[str, WorkerError] = {}

    def worker(self, name: str, role: str = "policy") -> Worker:
        if name in self.refused:
            raise self.refused[name]
        if (name, role) not in self.workers:
            engine = engine_named(name)
            log = self.args.out.parent / "logs" / f"{name.replace(' ', '-')}-{role}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            print(f"loading {name}", flush=True)
            worker = Worker(engine, self.args.threads, log)
            largest = [max(getattr(w, field) for w in self.workloads) for field in ("context", "cells", "samples")]
            try:
                self.results.record["sides"][name] = worker.load(self.workloads[0].model, *largest, self.args.source)
            except WorkerError as error:
                worker.close()
                self.refused[name] = error
                raise
            self.workers[name, role] = worker
        return self.workers[name, role]

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()


def engine_named(name: str) -> Engine:
    if name not in ENGINES:
        raise SystemExit(f"an engine must be one of {', '.join(ENGINES)}, got {name!r}")
    return ENGINES[name]


def names_of(workload: Workload, args) -> list[str]:
    """Sides of a workload, before anything is loaded."""
    ours = [name for name in args.engines if engine_named(name).peer == "ours"]
    if workload.kind == "strategies":
        return [f"{name} {strategy}" for name in ours for strategy in STRATEGIES]
    if workload.kind == "search":
        return [*ours, *args.searches]
    return [name for name in args.engines if workload.model == "smollm2" or ENGINES[name].form != "q4_1.gguf"]


def make_side(name: str, workload: Workload, cast: Cast) -> Side:
    if workload.kind == "strategies":
        engine, strategy = name.rsplit(" ", 1)
        return strategy_side(name, workload, cast.worker(engine), strategy)
    if workload.kind == "search" and " / " not in name:
        return strategy_side(name, workload, cast.worker(name), "beam_search")
    if workload.kind == "search":
        policy, reward, how = name.split(" / ")
        if how not in ("whole", "steps"):
            raise SystemExit(f'a search must read "POLICY / REWARD MODEL / whole or steps", got {name!r}')
        workers = cast.worker(policy), cast.worker(reward, "reward")
        return search_side(name, workload, *workers, how == "whole")
    return samples_side(name, workload, cast.worker(name))


def time_workload(workload: Workload, args, results: Results, cast: Cast, machine: Machine) -> None:
    sides = []
    for name in names_of(workload, args):
        if too_long(results, workload, name, args) or len(results.has(workload.name, name)) >= args.rounds:
            continue
        try:
            sides.append(make_side(name, workload, cast))
            sides[-1].warm()
        except WorkerError as error:
            fail(results, workload, name, error)
    for round_ in range(args.rounds):
        turn = round_ % max(len(sides), 1)
        if any(not results.has(workload.name, side.name, round_) for side in sides):
            measure_peaks(args, results, machine, workload, round_)
        for side in sides[turn:] + sides[:turn]:
            if results.has(workload.name, side.name, round_) or too_long(results, workload, side.name, args):
                continue
            machine.take()
            try:
                for _ in range(args.tries):
                    wait_for_quiet(args.disturbed)
                    found, others = others_share(lambda s=side, r=round_: s.run(r), list(side.workers.values()))
                    if others <= args.disturbed:
                        break
                    print(f"{workload.name} {side.name}: others took {100 * others:.0f} % of the cores; again", flush=True)
                    results.record["disturbed"].append([workload.name, side.name, round_, found["seconds"], others])
            except WorkerError as error:
                fail(results, workload, side.name, error)
                continue
            found["others_share"] = others
            run = {"workload": workload.name, "side": side.name, "round": round_, "bits": side.bits, **found}
            results.record["runs"].append({**run, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
            results.save()
            print(f"{workload.name} round {round_} {side.name:44} {found['seconds']:8.2f} s", flush=True)
            machine.give(after=machine.seconds)
    machine.give()


def too_long(results: Results, workload: Workload, name: str, args) -> bool:
    return any(run["seconds"] > args.long for run in results.has(workload.name, name))


def fail(results: Results, workload: Workload, name: str, error: Exception) -> None:
    """A side that cannot run is part of the result."""
    print(f"{workload.name} {name}: {error}", flush=True)
    results.record["failed"].append({"workload": workload.name, "side": name, "error": str(error)[:500]})
    results.save()


def describe(args, results: Results) -> None:
    """Machine, commit, command."""
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    cpu = next((x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), "")
    record = results.record
    record |= {"machine": cpu or platform.machine(), "cores": os.cpu_count(), "threads": args.threads}
    record["commit"] = head.stdout.strip() or "unknown"
    given = sys.argv[1:]
    if "--hold" in given:  # how this machine is shared is no part of the measurement
        at = given.index("--hold")
        del given[at : at + 2]
    words = [Path(word).name if word.startswith("/") else word for word in given]
    record["commands"].append(shlex.join(["python", "bench/peers/run.py", *words]))
    results.save()


def measure_peaks(args, results: Results, machine: Machine, workload: Workload, round_: int) -> None:
    """What the machine can do, once a round: neighbours move it, and the roofline with it."""
    worker = Worker(Engine("ours", "bf16", "hf"), args.threads, Path(os.devnull))
    machine.take()
    wait_for_quiet(args.disturbed)
    found = {"workload": workload.name, "round": round_, **worker.call("peaks")}
    results.record.setdefault("peaks", []).append(found)
    worker.close()
    results.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("time", "report"))
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), metavar="ENGINE", help=", ".join(ENGINES))
    parser.add_argument("--searches", nargs="*", default=[], metavar="SEARCH", help='"POLICY / REWARD MODEL / whole|steps"')
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--long", type=float, default=60.0, help="seconds of a call above which it is not repeated")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--disturbed", type=float, default=0.05, help="share of the cores that others may take during a call")
    parser.add_argument("--tries", type=int, default=2, help="how often a disturbed call is made before it counts as it is")
    parser.add_argument("--hold", help="command that holds the machine while its argument runs")
    parser.add_argument("--hold-seconds", type=float, default=100.0, help="after which it is let go of, between calls")
    parser.add_argument("--source", type=Path, help="dry run: this small Hugging Face folder, at sizes that take seconds")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / f"peers-{time.strftime('%Y-%m-%d')}.json")
    parser.add_argument("--plot", type=Path, help="report: write the sweep over N there (PNG)")
    args = parser.parse_args()
    results = Results(args.out)
    if args.what == "time":
        machine = Machine(args.hold, args.hold_seconds)
        describe(args, results)
        wanted = [tiny(WORKLOADS[name]) if args.source else WORKLOADS[name] for name in args.workloads]
        for model in dict.fromkeys(workload.model for workload in wanted):
            cast = Cast(args, results, [workload for workload in wanted if workload.model == model])
            try:
                for workload in cast.workloads:
                    time_workload(workload, args, results, cast, machine)
            finally:
                machine.give()
                cast.close()
    done = {run["workload"] for run in results.record["runs"]}
    workloads = {name: tiny(w) if args.source else w for name, w in WORKLOADS.items() if name in done}
    shapes = {model: Shape.read(get(model, "hf", args.source)) for model in {w.model for w in workloads.values()}}
    results.record["report"] = report(results.record, workloads, shapes, args.plot)
    results.save()
    print(json.dumps(results.record["report"]))


def tiny(workload: Workload) -> Workload:
    """The same workload at a size for a dry run."""
    steps, model = min(workload.steps, 3), "source"
    return replace(workload, prompt=24, samples=min(workload.samples, 8), tokens=5, steps=steps, model=model)


if __name__ == "__main__":
    main()
