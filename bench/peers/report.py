"""From runs to tables: median and spread, times our best, percent of the machine's floor, and where we lose."""

from __future__ import annotations

import statistics
from pathlib import Path

from floor import Rates, Shape, job_seconds, kv_tokens
from workloads import SWEEP, Workload


def rates_of(peaks: dict, bits: str) -> Rates:
    """What a job is held against: the fastest products of 16-bit inputs and weights of 2 bytes; with "int8" products of bytes
    (16-bit ones in files of before these were measured) and weights of 1, attention as before."""
    products = max(peaks["fma_gflops"], peaks.get("dot_gflops", 0.0))
    if bits == "bf16":
        return Rates(products, products, peaks["read_gbps"])
    return Rates(max(products, peaks.get("bytes_gflops", 0.0)), products, peaks["read_gbps"], weight_bytes=1)


def peaks_of(record: dict, workload: str | None = None) -> dict[str, float]:
    """Medians over the rounds of a workload, or over all; files of before rounds were measured hold one measurement."""
    peaks = record["peaks"]
    if isinstance(peaks, dict):
        return peaks
    mine = [each for each in peaks if workload in (None, each["workload"])] or peaks
    return {k: statistics.median(each[k] for each in mine) for k in mine[0] if k not in ("workload", "round")}


def rows_of(record: dict, workload: Workload, shape: Shape) -> list[dict]:
    """One entry a side, fastest first."""
    rows = []
    runs = [run for run in record["runs"] if run["workload"] == workload.name]
    for side in dict.fromkeys(run["side"] for run in runs):
        mine = [run for run in runs if run["side"] == side]
        seconds = [run["seconds"] for run in mine]
        alone = [run["prefill_alone_seconds"] for run in mine if "prefill_alone_seconds" in run]
        rates = rates_of(peaks_of(record, workload.name), mine[0]["bits"])
        scored = workload.kind != "samples"
        floor = job_seconds(workload, shape, rates, scored)
        median = statistics.median(seconds)
        rows.append({
            "side": side, "bits": mine[0]["bits"], "rounds": len(mine), "seconds": median,
            "low": min(seconds), "high": max(seconds),
            "prefill_seconds": statistics.median(alone) if alone else None, "tokens_per_second": workload.decoded / median,
            "floor_percent": 100 * floor / median,
            "estimated": any(run.get("estimated") for run in mine),
            "others_share": max((run["others_share"] for run in mine if "others_share" in run), default=None),
            "peak_kv_bytes": max((run["peak_kv_bytes"] for run in mine if "peak_kv_bytes" in run), default=None),
        })  # fmt: skip
    return sorted(rows, key=lambda row: row["seconds"])


def print_table(workload: Workload, rows: list[dict], failed: list[dict]) -> None:
    size = f"P {workload.prompt}, N {workload.samples}, T {workload.tokens}"
    if workload.kind != "samples":
        size += f", M {workload.width}, {workload.steps} steps"
    print(f"\n{workload.name}: {workload.title} ({size}, {workload.model})\n")
    print("| side | rounds | median s | spread s | prefill alone s | tokens/s | x our best bf16 | % of floor |")
    print("|---|---|---|---|---|---|---|---|")
    base = next((row["seconds"] for row in rows if is_ours(row) and row["bits"] == "bf16"), None)
    for row in rows:
        cells = [
            row["side"], str(row["rounds"]), f"{row['seconds']:.2f}" + (" (estimated)" if row["estimated"] else ""),
            f"{row['low']:.2f} .. {row['high']:.2f}", number(row["prefill_seconds"], 2), f"{row['tokens_per_second']:.0f}",
            number(row["seconds"] / base if base else None, 2), number(row["floor_percent"], 0),
        ]  # fmt: skip
        print("| " + " | ".join(cells) + " |")
    noisy = [row["side"] for row in rows if (row["others_share"] or 0) > 0.05]
    if noisy:
        print(f"others took more than 5 % of the cores during a call of: {', '.join(noisy)}")
    for each in failed:
        print(f"{each['side']} did not run: {each['error'][:200]}")


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def is_ours(row: dict) -> bool:
    return row["side"].startswith("ours")


def verdicts(workload: Workload, rows: list[dict]) -> dict[str, float]:
    """The ratios that a workload is about; above 1 we are faster (but for W0, where they are our cost of a search)."""
    found: dict[str, float] = {}
    ours = [row for row in rows if is_ours(row)]
    peers = [row for row in rows if not is_ours(row)]
    if workload.kind == "strategies":
        seconds = {row["side"]: row["seconds"] for row in rows}
        for side, value in seconds.items():
            engine, strategy = side.rsplit(" ", 1)
            if strategy != "best_of_n" and f"{engine} best_of_n" in seconds:
                found[f"{side} / best_of_n"] = value / seconds[f"{engine} best_of_n"]
        return found
    if workload.kind == "search":
        for how in ("whole", "steps"):
            against = [row["seconds"] for row in peers if row["side"].endswith(f" / {how}")]
            for row in ours if against else ():
                found[f"{row['side']} against the best '{how}'"] = min(against) / row["seconds"]
        return found
    plain = [row["seconds"] for row in peers if row["bits"] == "bf16"]
    for row in ours:
        if plain and row["bits"] == "bf16":
            found[f"{row['side']} against the best bf16 peer"] = min(plain) / row["seconds"]
        if peers:
            found[f"{row['side']} against the best peer"] = peers[0]["seconds"] / row["seconds"]
    return found


def report(record: dict, workloads: dict[str, Workload], shapes: dict[str, Shape], plot: Path | None) -> dict:
    """Print every table, W0 first, and return them."""
    peaks = peaks_of(record)
    print(f"{record['machine']}, {record['threads']} threads; measured: " + ", ".join(f"{k} {v:.1f}" for k, v in peaks.items()))
    found = {}
    for name, workload in workloads.items():  # in the order of the table of workloads, which begins with W0
        rows = rows_of(record, workload, shapes[workload.model])
        print_table(workload, rows, [each for each in record["failed"] if each["workload"] == name])
        ratios = verdicts(workload, rows)
        for what, ratio in ratios.items():
            lost = "" if workload.kind == "strategies" or ratio >= 1 else "   <- we lose"
            print(f"{what}: {ratio:.2f} x{lost}")
        found[name] = {"rows": rows, "ratios": ratios}
    sweep = sweep_of(found, workloads, shapes)
    if sweep:
        print_sweep(sweep)
        if plot:
            draw_sweep(sweep, plot)
    print("\nversions: " + "; ".join(f"{side}: {versions_of(about)}" for side, about in record["sides"].items()))
    return found


def versions_of(about: dict) -> str:
    return ", ".join(f"{name} {version}" for name, version in about["versions"].items())


def sweep_of(found: dict, workloads: dict[str, Workload], shapes: dict[str, Shape]) -> dict[str, list[dict]]:
    """Per side the points of W1 over N, where at least two are there."""
    points: dict[str, list[dict]] = {}
    for name in SWEEP:
        for row in found.get(name, {}).get("rows", ()):
            workload = workloads[name]
            shape = shapes[workload.model]
            token_bytes = 4 * shape.layers * shape.kv_heads * shape.head_dim
            points.setdefault(row["side"], []).append({
                "samples": workload.samples, "seconds_per_sample": row["seconds"] / workload.samples,
                "kv_bytes": row["peak_kv_bytes"], "predicted_kv_bytes": token_bytes * kv_tokens(workload),
            })  # fmt: skip
    return {side: each for side, each in points.items() if len(each) > 1}


def print_sweep(sweep: dict[str, list[dict]]) -> None:
    print("\nSeconds a sample as N grows (W1)\n")
    top = max(point["seconds_per_sample"] for each in sweep.values() for point in each)
    for side, each in sweep.items():
        for point in each:
            seconds, kv = point["seconds_per_sample"], ""
            if point["kv_bytes"]:
                kv = f"  KV {point['kv_bytes'] / 2**20:6.0f} MiB, the forest predicts {point['predicted_kv_bytes'] / 2**20:.0f}"
            print(f"{side:24} N {point['samples']:4} {seconds:8.3f} s {'#' * max(1, round(40 * seconds / top)):40}{kv}")


def draw_sweep(sweep: dict[str, list[dict]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.subplots()
    for side, each in sweep.items():
        at = [point["samples"] for point in each]
        left.plot(at, [point["seconds_per_sample"] for point in each], marker="o", label=side)
    left.set(xscale="log", yscale="log", xlabel="samples N of one prompt of 1024 tokens", ylabel="seconds a sample")
    ticks = sorted({point["samples"] for each in sweep.values() for point in each})
    left.set_xticks(ticks, [str(n) for n in ticks])
    left.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
