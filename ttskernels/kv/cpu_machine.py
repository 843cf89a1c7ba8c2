"""The planner's constants of this machine's CPU: measured once, with the attention kernel itself, and kept in a file.

TTSK_MACHINE says where they come from instead: "default" (those built in) or a file. A plan's constants decide who reads
what together, never a result's bits.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import platform
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

from ttskernels import _dispatch
from ttskernels._cache import cache_root, keep
from ttskernels.kv.plan_layout import HeadShape, Machine

FIELDS = {f.name: f.type for f in fields(Machine)}
MEASURED = ("workers", "flops_per_second", "bytes_per_second", "partial_bytes_per_second", "item_us")
ROUNDS, LEAST_SECONDS = 5, 0.2  # of each of five measurements: the best of many short calls
MOST_PREEMPTIONS = 50  # a second and thread: an idle machine has a few, a shared core hundreds


class BusyError(RuntimeError):
    """Other processes ran meanwhile: what was measured is not this machine."""


@functools.cache
def cpu_machine() -> Machine:
    """What `build_plan` takes where it is given no machine.

    `TTSK_MACHINE=default`, or no C++ extension: the constants built in. `TTSK_MACHINE=FILE`: those of the file. Otherwise
    those measured here before (see `kept_file`), or measured now, which takes about a second; while other processes take
    the cores, those built in, and a later process tries again.

    Raises:
        ValueError: TTSK_MACHINE names a file that holds no constants.
    """
    wanted = os.environ.get("TTSK_MACHINE", "")
    if wanted == "default" or _dispatch.load_extension() is not None:
        return Machine()
    if wanted:
        return read_machine(Path(wanted).expanduser())
    if file := kept_file():
        try:
            return read_machine(file)
        except ValueError as error:
            warnings.warn(f"{error}; measuring again", stacklevel=2)
    try:
        return measure_and_keep()
    except BusyError:
        return Machine()


def machine_file() -> Path:
    """Where this CPU's constants are kept: one file a CPU, instruction-set level and number of threads."""
    name = f"{cpu_name()} {_dispatch.isa_name()} {_dispatch.library().ttsk_num_threads()}"
    return cache_root() / "machines" / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def kept_file() -> Path | None:
    """`machine_file`, if it is there and can be reached."""
    try:
        return file if (file := machine_file()).is_file() else None
    except OSError:
        return None


def cpu_name() -> str:
    """As the system has it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def read_machine(file: Path) -> Machine:
    """The constants in a file: an object whose "machine" has fields of `Machine`; the others are as built in.

    Raises:
        ValueError: no such file, no such object, an unknown field, or one that is no positive number.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))["machine"]
        unknown = sorted(set(values) - set(FIELDS))
        wrong = {k: v for k, v in values.items() if isinstance(v, bool) or not isinstance(v, int | float) or not v < 1e30}
        if unknown or wrong:
            raise ValueError(f"unknown {unknown}" if unknown else f"no finite numbers: {wrong}")
        return Machine(**{k: int(v) if FIELDS[k] == "int" else float(v) for k, v in values.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the planner's constants in {file} must be {{'machine': {{{', '.join(FIELDS)}}}}} with positive numbers, "
            f"got {type(error).__name__}: {error}"
        ) from error


def measure_and_keep() -> Machine:
    """Measure, and write the file that the next process reads.

    Raises:
        BusyError: see there; nothing is written.
    """
    machine = measure()
    record = {
        "cpu": cpu_name(), "isa": _dispatch.isa_name(), "measured": datetime.date.today().isoformat(),
        "machine": {k: v for k, v in asdict(machine).items() if k in MEASURED},
    }  # fmt: skip
    try:
        keep(machine_file(), lambda fresh: fresh.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8"))
    except OSError as error:
        warnings.warn(f"the planner's constants cannot be kept ({error}); set TTSK_CACHE or TTSK_MACHINE", stacklevel=2)
    return machine


def measure() -> Machine:
    """The constants of this CPU at the active instruction-set level, with all threads, bf16 K and V.

    Raises:
        BusyError: the threads were taken off their cores too often.
    """
    workers = _dispatch.library().ttsk_num_threads()
    # Compute: the last 96 tokens of one node are rows, so every tile is read by all of them.
    tokens, rows = 512, 96
    heads = HeadShape(8, 2, 128, 128, 2)
    seconds = attention_seconds(heads, [tokens], [(0, tokens - rows + i) for i in range(rows)])
    flops = 4 * heads.q_heads * heads.head_dim * sum(range(tokens - rows + 1, tokens + 1)) / seconds
    # Reading: chains of their own, more than caches hold, each read by one row of one head.
    tokens, chains = 2048, 8
    heads = HeadShape(8, 8, 128, 128, 2)
    seconds = attention_seconds(heads, [tokens] * chains, [(i, tokens - 1) for i in range(chains)])
    read = chains * tokens * heads.kv_heads * (heads.head_dim + heads.v_dim) * heads.kv_bytes / seconds
    # Items: what 512 more chains of one token cost.
    heads = HeadShape(8, 2, 64, 64, 2)
    few, many = (attention_seconds(heads, [1] * n, [(i, 0) for i in range(n)]) for n in (256, 768))
    built_in = Machine()
    return Machine(
        workers=workers,
        flops_per_second=flops,
        bytes_per_second=read,
        partial_bytes_per_second=workers * copied_bytes_per_second(),
        item_us=max(0.05 * built_in.item_us, 1e6 * workers * (many - few) / 512),
    )


def attention_seconds(heads: HeadShape, lengths: list[int], rows: list[tuple[int, int]]) -> float:
    """Of one call over nodes without parents, for rows `(node, position)`."""
    import torch

    from ttskernels.kv.plan import plan_from_parents
    from ttskernels.kv.pool import PAGE_SIZE, PagePool
    from ttskernels.ops.tree_attention import tree_attention

    counts = [-(-length // PAGE_SIZE) for length in lengths]
    indptr = [sum(counts[:i]) for i in range(len(counts) + 1)]
    pool = PagePool(1, heads.kv_heads, heads.head_dim, indptr[-1], torch.bfloat16)
    pool.k.fill_(0.5), pool.v.fill_(0.5)
    node, position = zip(*rows, strict=True)
    plan = plan_from_parents([-1] * len(lengths), lengths, indptr, range(indptr[-1]), node, position, heads, machine=Machine())
    q = torch.full((len(rows), heads.q_heads, heads.head_dim), 0.5, dtype=torch.bfloat16)
    return best_seconds(lambda: tree_attention(q, pool.k[0], pool.v[0], plan, impl="cpu"))


def copied_bytes_per_second() -> float:
    """Bytes written and read again by one core, within its second cache."""
    import numpy as np

    source, target = np.ones(65536, np.float32), np.zeros(65536, np.float32)
    return 2 * source.nbytes / best_seconds(lambda: np.copyto(target, source))


def best_seconds(function: Callable[[], object]) -> float:
    function()
    best, rounds, begin, before = float("inf"), 0, time.perf_counter(), preemptions()
    while rounds < ROUNDS or time.perf_counter() < begin + LEAST_SECONDS:
        started = time.perf_counter()
        function()
        best, rounds = min(best, time.perf_counter() - started), rounds + 1
    rate = (preemptions() - before) / (time.perf_counter() - begin) / _dispatch.library().ttsk_num_threads()
    if rate > MOST_PREEMPTIONS:
        raise BusyError(f"other processes take the cores ({rate:.0f} preemptions a second and thread); try again when they rest")
    return best


def preemptions() -> int:
    """How often a thread of this process was taken off its core so far; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def describe() -> str:
    """One line for `python -m ttskernels`; measures nothing."""
    if _dispatch.load_extension() is not None or os.environ.get("TTSK_MACHINE") == "default":
        return f"built in: {numbers(Machine())}"
    wanted = os.environ.get("TTSK_MACHINE")
    file = Path(wanted).expanduser() if wanted else kept_file()
    if file is None:
        return "not measured yet: at the first plan, or now by `python -m ttskernels machine`"
    try:
        return f"{numbers(read_machine(file))} ({file})"
    except ValueError as error:
        return f"unusable: {error}"


def numbers(machine: Machine) -> str:
    return (
        f"{machine.workers} workers, {machine.flops_per_second / 1e9:.0f} GFLOP/s, "
        f"{machine.bytes_per_second / 1e9:.1f} GB/s, partials {machine.partial_bytes_per_second / 1e9:.0f} GB/s, "
        f"{machine.item_us:.2f} us an item"
    )
