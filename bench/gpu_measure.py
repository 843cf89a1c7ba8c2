"""How bench/gpu.py times: replays of CUDA graphs, caches cold and warm, and the rows of results it writes."""

from __future__ import annotations

import faulthandler
import functools
import json
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ttskernels.models.config import DecoderConfig
from ttskernels.roofline import Shape

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float16  # the interpreter's bf16 products are wrong
FLOPS = 600e12
REPLAYS = 30
MARGIN_S = 40.0  # that a case may take after the part's time is up
DID_NOT_END = "did not end"  # how the row of such a case begins
Timing = dict[str, dict[str, float]]


def copies_for(read_bytes: int, held_bytes: int = 0) -> int:
    """Copies of a call's inputs to go through in turn, so that each finds the second-level cache cold: what calls read is
    together at least four times its size. What copies hold, if more, takes no more than a quarter of the memory."""
    if not GPU:
        return 1
    properties = torch.cuda.get_device_properties(DEVICE)
    enough = -(-4 * properties.L2_cache_size // max(1, read_bytes))
    room = properties.total_memory // 4 // max(1, read_bytes, held_bytes)
    return int(max(1, min(enough, room)))


@functools.cache
def capture_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream(DEVICE)


def measure(work: Callable[[int], object], copies: int = 1, *, graph: bool = True) -> Timing:
    """Time of one call of `work(i)`, `i < copies` naming the inputs to use: microseconds, median, p20 and p80.

    A graph of many calls is replayed: through all copies in turn (cold; what the layers of a model do), and of the first
    alone (warm). `graph=False` takes eager calls between events. What takes long is repeated less often. A dry run calls
    once and returns {}.
    """
    if not GPU:
        work(0)
        return {}
    torch.cuda.synchronize()
    with torch.cuda.stream(capture_stream()):
        work(0)  # compiles, and grows workspaces of the stream that is captured
    torch.cuda.synchronize()
    started = time.perf_counter()
    with torch.cuda.stream(capture_stream()):
        work(0)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    calls = max(4, copies) if seconds < 0.02 else 1
    replays = REPLAYS if seconds * calls * REPLAYS < 1.0 else 5
    out = {}
    for state in ("cold", "warm"):
        order = [i % copies if state == "cold" else 0 for i in range(calls)]

        def run(order=order):
            for i in order:
                work(i)

        replay = run
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured, stream=capture_stream()):
                run()
            replay = captured.replay
        times = []
        for number in range(replays + 2):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            replay()
            end.record()
            end.synchronize()
            if number >= 2:
                times.append(start.elapsed_time(end) * 1e3 / calls)
        times.sort()
        out[state] = {"median_us": statistics.median(times), "p20_us": times[replays // 5], "p80_us": times[-replays // 5]}
    return out


def attempt(make: Callable[[], Timing]) -> Timing | str:
    """A rival's timing, or why there is none: a missing package or a failing rival must not end the run."""
    try:
        return make()
    except Exception as error:  # noqa: BLE001 - whatever somebody else's code raises is the result
        if GPU:
            torch.cuda.empty_cache()
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else ''}"


def copy_bandwidth() -> float:
    """Bytes per second of a large copy, read and written: by the driver or by a kernel, whichever is faster."""
    if not GPU:
        return 1e9
    a = torch.zeros(1 << 28, dtype=torch.float32, device=DEVICE)
    b = torch.empty_like(a)
    ways = (lambda _: b.copy_(a), lambda _: torch.neg(a, out=b))
    fastest = min(measure(way, graph=False)["warm"]["median_us"] for way in ways)
    return 2 * a.numel() * a.element_size() / (fastest * 1e-6)


def random_config(shape: Shape, tied: bool) -> DecoderConfig:
    """A decoder of this shape, on the device, for random weights."""
    inv_freq = 1e4 ** -(torch.arange(shape.head_dim // 2) / shape.head_dim * 2)
    return DecoderConfig(
        vocab=shape.vocab, hidden=shape.hidden, layers=shape.layers, q_heads=shape.q_heads, kv_heads=shape.kv_heads,
        head_dim=shape.head_dim, intermediate=shape.intermediate, rms_eps=1e-6, inv_freq=inv_freq.to(DEVICE), rope_scale=1.0,
        max_positions=1 << 20, qkv_bias=False, o_bias=False, qk_norm=False, tie_embeddings=tied, window=0,
        scale=shape.head_dim**-0.5, dtype=DTYPE, eos_ids=(), model_type="random",
    )  # fmt: skip


class OutOfTime(BaseException):
    """Inside a case. No `Exception`, which `attempt` would take for a rival's failure."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises OutOfTime inside after so long; ends the process ten seconds later if a call into a library, such as waiting for a
    GPU that hangs, does not return. Only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise OutOfTime

    former = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(seconds + 10, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, former)


class Rows:
    """Results of one part, kept by name in a JSON file that is written around every case, with a table beside it."""

    def __init__(self, path: Path, head: dict, minutes: float, title: str):
        self.path, self.head, self.title = path, head, title
        self.deadline = time.monotonic() + minutes * 60
        former = json.loads(path.read_text()) if path.exists() else {}
        same = head["commit"] is not None and head["commit"] == former.get("commit")  # None: which code is unknown
        cases: dict[str, dict] = former.get("cases", {})
        self.late = {name for name, row in cases.items() if row.get("failed", "").startswith(DID_NOT_END)}
        self.done = cases if same else {}
        self.left_out: list[str] = []

    def unfinished_first(self, names: Iterable[str]) -> list[str]:
        """Names without a row, then those that failed, then those that did not end, of whatever commit, then the others."""
        failed = set(self.failed)

        def rank(name: str) -> int:
            return 2 if name in self.late else 0 if name not in self.done else 1 if name in failed else 3

        return sorted(names, key=rank)

    def out_of_time(self) -> bool:
        return time.monotonic() > self.deadline

    def seconds_left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def __call__(self, name: str, row: dict) -> None:
        self.keep(name, row)
        print(name, {k: brief(v) for k, v in row.items()}, flush=True)

    def keep(self, name: str, row: dict) -> None:
        self.done.pop(name, None)
        self.done[name] = row
        fresh = self.path.with_suffix(".tmp")  # a run that is killed leaves the old file or the new one
        fresh.write_text(json.dumps(self.head | {"cases": self.done}, indent=1) + "\n")
        fresh.replace(self.path)
        self.path.with_suffix(".md").write_text(self.table())

    def run(self, cases: dict[str, Callable[[], dict]]) -> None:
        """Every case, until the time is up."""
        for name in self.unfinished_first(cases):
            if self.out_of_time():
                self.left_out.append(name)
                continue
            if "failed" in self.done.get(name, {"failed": None}):
                self.keep(name, {"failed": DID_NOT_END})  # what stays if this run is killed
            started = time.monotonic()
            try:
                with at_most(self.seconds_left() + MARGIN_S):
                    row = cases[name]()
            except OutOfTime:
                row = {"failed": f"{DID_NOT_END} in {time.monotonic() - started:.0f} s"}
            except Exception as error:  # noqa: BLE001 - one case must not lose the others
                row = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
            self(name, row)
        if self.left_out:
            how = "" if self.head["commit"] else "; without git it begins anew: raise --minutes"
            print(f"out of time: {len(self.left_out)} cases left; run again to go on with them{how}")

    @property
    def failed(self) -> list[str]:
        return [name for name, row in self.done.items() if "failed" in row]

    def table(self) -> str:
        """Cold medians and every other value, one line a case."""
        columns = list(dict.fromkeys(k for row in self.done.values() for k in row))
        head = ", ".join(f"{k} {v}" for k, v in self.head.items() if v is not None)
        lines = [f"# {self.title}", "", head + ". Microseconds are cold medians (p20 to p80); warm medians follow `|`.", ""]
        lines += ["| case | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for name, row in self.done.items():
            cells = (brief(row.get(c, "")).replace("|", "\\|") for c in columns)
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"


def brief(value) -> str:
    if isinstance(value, dict) and "cold" in value:
        cold, warm = value["cold"], value["warm"]
        return f"{cold['median_us']:.1f} ({cold['p20_us']:.1f} to {cold['p80_us']:.1f}) | {warm['median_us']:.1f}"
    if isinstance(value, dict):
        return "ran" if not value else ", ".join(f"{k} {brief(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
