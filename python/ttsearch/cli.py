"""`ttsearch`: solve a problem, list the strategies, evaluate over a problem file, compare two runs, calibrate a model."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.live import Live
from rich.table import Table

from .budget import Budget
from .calibrate import calibrate
from .console import INTERRUPTED, err, friendly_errors, out
from .strategies import STRATEGIES, get_strategy
from .types import Problem

DEMO_PROMPT = "10;a+17;b-13;c*6;d-71?"

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Search over reasoning steps with a policy and a process reward model.",
)  # fmt: skip

Strategy = Annotated[str, typer.Option(help=f"One of {', '.join(STRATEGIES)}.")]
N = Annotated[int, typer.Option("--n", help="Budget: paths kept alive per problem.")]
Width = Annotated[int, typer.Option(help="Beam width M: children per survivor.")]
Policy = Annotated[str | None, typer.Option(help="Policy: checkpoint folder or hub id [default: the demo policy].")]
Verifier = Annotated[str | None, typer.Option(help='Process reward model, or "none" [default: the demo verifier].')]
PrmFamily = Annotated[
    str | None, typer.Option(help="What the verifier reads or writes: a name, or a file that says [default: seen in its config].")
]
PrmReference = Annotated[
    str | None, typer.Option(help="Of an implicit PRM, the model that it was trained from: checkpoint folder or hub id.")
]
PrmBase = Annotated[
    str | None, typer.Option(help="Of an adapter or PQM, the model it was trained on [default: what its config names].")
]
PromptStyle = Annotated[str | None, typer.Option(help="plain, qwen, llama or r1 [default: by the chat template].")]
Limit = Annotated[int | None, typer.Option(help="Only the first problems of the file.")]
Seed = Annotated[int, typer.Option(help="Same seed, same tree.")]
Temperature = Annotated[float, typer.Option(help="0: always the likeliest token.")]
TopK = Annotated[int, typer.Option(help="Sample among the k likeliest tokens; 0: all.")]
TopP = Annotated[float, typer.Option(help="Sample within this probability mass.")]
MinP = Annotated[float, typer.Option(help="Leave out tokens below this share of the likeliest one's probability.")]
Aggregate = Annotated[str, typer.Option(help="Path score from step scores: product, min, mean or last.")]
Vote = Annotated[str, typer.Option(help="Answer from paths: max, weighted, softmax or majority.")]
MaxTokens = Annotated[int, typer.Option(help="Generated tokens per path.")]
MaxStepTokens = Annotated[int, typer.Option(help="Generated tokens per step.")]
MaxSteps = Annotated[int, typer.Option(help="Steps per path.")]
KvGib = Annotated[float | None, typer.Option(help="Memory for the KV of both models, in GiB.")]
Device = Annotated[str, typer.Option(help="cpu, or cuda: models, KV and kernels on a GPU.")]
Kv = Annotated[str, typer.Option(help="How K and V are kept: auto, float; on a CPU int16 or int8, on a GPU fp8.")]
Weights = Annotated[str, typer.Option(help="auto, float, int16, int8 or calibrated: how a CPU keeps matrices.")]
Speculate = Annotated[
    str, typer.Option(help="Begin next steps while siblings still decode: off, sure or likely; results are the same.")
]
Concurrency = Annotated[int, typer.Option(help="Problems searched at the same time.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


@app.command()
def solve(
    problem: Annotated[
        str | None, typer.Argument(help="Problem text [default: a problem of the demo task].")
    ] = None,
    strategy: Strategy = "beam_search",
    n: N = 16,
    width: Width = 4,
    policy: Policy = None,
    verifier: Verifier = None,
    prm_family: PrmFamily = None,
    prm_reference: PrmReference = None,
    prm_base: PrmBase = None,
    prompt_style: PromptStyle = None,
    problem_file: Annotated[
        str | None, typer.Option(help="JSONL file or hub dataset: solve its problems.")
    ] = None,
    limit: Limit = None,
    seed: Seed = 0,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    aggregate: Aggregate = "product",
    vote: Vote = "weighted",
    max_tokens: MaxTokens = 8192,
    max_step_tokens: MaxStepTokens = 2048,
    max_steps: MaxSteps = 40,
    kv_gib: KvGib = None,
    device: Device = "cpu",
    weights: Weights = "auto",
    kv: Kv = "auto",
    speculate: Speculate = "sure",
    plot: Annotated[Path | None, typer.Option(help="Draw the tree to this SVG or PNG file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Solve a problem; show the search tree, the answer and what it cost. Ctrl-C shows what is finished."""
    from .backend import load_backend
    from .data import load_problems
    from .plot import plot_path, plot_tree
    from .run import check
    from .solve import error_record
    from .solve import solve as solve_problem

    with friendly_errors():
        if problem is not None and problem_file is not None:
            raise ValueError("pass a problem or --problem-file, not both")
        if plot is not None and problem_file is not None:
            raise ValueError("--plot draws the tree of one problem; it cannot be used with --problem-file")
        if limit is not None and problem_file is None:
            raise ValueError("--limit takes the first problems of a file; pass --problem-file, or leave it out")
        if plot is not None:
            plot_path(plot)
        sampling = dict(
            seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, max_tokens=max_tokens,
            max_step_tokens=max_step_tokens, max_steps=max_steps,
        )  # fmt: skip
        budget = get_strategy(strategy).prepare(Budget(n, width, aggregate=aggregate, vote=vote, **sampling))
        problems = load_problems(problem_file, limit) if problem_file else [_one_problem(problem, policy)]
        backend = load_backend(
            policy, verifier, prm_family=prm_family, prm_reference=prm_reference, prm_base=prm_base,
            prompt_style=prompt_style, kv_gib=kv_gib, device=device, weights=weights, kv=kv, speculate=speculate,
        )  # fmt: skip
        records, refused, interrupted = [], 0, False
        try:
            check(backend, strategy, budget)
            for item in problems:
                try:
                    with _live(not as_json) as progress:
                        result = solve_problem(
                            item, backend=backend, strategy=strategy, n=n, width=width, aggregate=aggregate, vote=vote,
                            progress=progress, **sampling,
                        )  # fmt: skip
                except ValueError as error:  # this problem cannot be solved here; the others can
                    if problem_file is None:
                        raise
                    refused += 1
                    records.append(error_record(item, strategy, budget, error))
                    err.print(f"problem {item.id}: {error}", style="red", highlight=False, markup=False)
                    continue
                records.append(result.to_dict())
                interrupted = result.interrupted
                if not as_json:
                    _show(result)
                if interrupted:
                    break
        finally:
            backend.close()
        _note_failures(getattr(backend, "verifier", None))
        if as_json:
            _print_json(records if problem_file else records[0])
        if plot is not None and result.root.children:
            plot_tree(result, plot)
        elif plot is not None:
            err.print(f"no step is finished: {plot} is not drawn", highlight=False, markup=False)
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    if refused:
        raise typer.Exit(1)


def _one_problem(text: str | None, policy: str | None) -> Problem:
    if text is not None:
        return Problem(text)
    if policy is not None:
        raise ValueError("pass a problem, or --problem-file; the demo problem is for the demo policy")
    return Problem(DEMO_PROMPT)


def _show(result) -> None:
    from .show import render_result

    out.print(render_result(result))


@contextmanager
def _live(enabled: bool):
    from .show import progress_line

    if not enabled or not err.is_terminal:
        yield None
        return
    with Live(console=err, transient=True, auto_refresh=False) as live:
        yield lambda progress: live.update(progress_line(progress), refresh=True)


def _note_failures(verifier) -> None:
    """What a generative verifier could not judge."""
    failures = getattr(verifier, "failures", None) or {}
    if failures:
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(failures.items()))
        err.print(f"verifications without a score: {counts}", highlight=False, markup=False)


def _print_json(document) -> None:
    sys.stdout.write(json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n")


@app.command()
def strategies(as_json: AsJson = False) -> None:
    """List the strategies."""
    if as_json:
        _print_json(
            [{"name": s.name, "description": s.description, "source": s.source} for s in STRATEGIES.values()]
        )
        return
    table = Table("strategy", "what it does", "verifier", "source")
    for s in STRATEGIES.values():
        table.add_row(s.name, s.description, "yes" if s.needs_verifier else "no", s.source)
    out.print(table)


@app.command()
def evaluate(
    problem_file: Annotated[str, typer.Argument(help="JSONL file or hub dataset, with answers.")],
    strategy: Annotated[list[str], typer.Option(help="May be given several times.")] = ["beam_search"],  # noqa: B006
    n: Annotated[list[int], typer.Option("--n", help="May be given several times.")] = [16],  # noqa: B006
    width: Width = 4,
    policy: Policy = None,
    verifier: Verifier = None,
    prm_family: PrmFamily = None,
    prm_reference: PrmReference = None,
    prm_base: PrmBase = None,
    prompt_style: PromptStyle = None,
    limit: Limit = None,
    seed: Seed = 0,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    aggregate: Aggregate = "product",
    vote: Vote = "weighted",
    max_tokens: MaxTokens = 8192,
    max_step_tokens: MaxStepTokens = 2048,
    max_steps: MaxSteps = 40,
    kv_gib: KvGib = None,
    device: Device = "cpu",
    weights: Weights = "auto",
    kv: Kv = "auto",
    speculate: Speculate = "sure",
    concurrency: Concurrency = 8,
    results: Annotated[Path, typer.Option(help="Folder of result files; run again to continue.")] = Path(
        "runs/evaluate"
    ),
    as_json: AsJson = False,
) -> None:
    """Accuracy with a 95 % interval and mean cost, for every strategy at every N."""
    from .backend import load_backend
    from .data import load_problems
    from .evaluate import runs, sweep
    from .report import HEADER, markdown, row

    with friendly_errors():
        budget = Budget(
            n[0],
            width,
            max_steps,
            max_tokens,
            max_step_tokens,
            temperature,
            top_k,
            top_p,
            min_p,
            seed,
            aggregate,
            vote,
        )
        problems = load_problems(problem_file, limit)
        backend = load_backend(
            policy, verifier, prm_family=prm_family, prm_reference=prm_reference, prm_base=prm_base,
            prompt_style=prompt_style, kv_gib=kv_gib, device=device, weights=weights, kv=kv, speculate=speculate,
            keep_prompts=False,  # what a strategy costs must not depend on which came before it
        )  # fmt: skip

        def progress(name: str, count: int, done: int, total: int) -> None:
            err.print(
                f"{name} N={count}: {done} of {total}", end="\r" if err.is_terminal else "\n", highlight=False
            )

        try:
            summaries = sweep(
                problems, backend, strategy, budget, n, results, concurrency=concurrency, progress=progress
            )
        finally:
            backend.close()
        _note_failures(getattr(backend, "verifier", None))
    if as_json:
        _print_json([summary.to_dict() for summary in summaries])
    else:
        table = Table(*HEADER)
        for summary in summaries:
            table.add_row(*row(summary))
        if out.measure(table, options=out.options.update(max_width=1000)).maximum <= out.width:
            out.print(table)
        else:  # it would cut names and digits
            out.print(markdown(summaries), soft_wrap=True, highlight=False, markup=False)
        for summary in summaries:
            if summary.first_error is not None:
                what = f"{summary.strategy} N={summary.n}, the first problem without a result"
                out.print(f"{what}: {summary.first_error}", highlight=False, markup=False)
    if len(summaries) < len(runs(strategy, n)) or any(each.problems < len(problems) for each in summaries):
        raise typer.Exit(INTERRUPTED)


@app.command()
def score(
    solutions_file: Annotated[str, typer.Argument(help="JSONL file: a problem and its solutions a line.")],
    verifier: Annotated[str, typer.Option(help="Process reward model: checkpoint folder or hub id.")],
    results: Annotated[Path, typer.Option(help="Results file; run again to continue.")],
    prm_family: PrmFamily = None,
    prm_reference: PrmReference = None,
    prm_base: PrmBase = None,
    separator: Annotated[str, typer.Option(help="Cuts a solution's text into steps; \\n is a newline.")] = r"\n\n",
    limit: Limit = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32, of weights and KV.")] = "bf16",
    kv_gib: KvGib = None,
    device: Device = "cpu",
    weights: Weights = "auto",
    kv: Kv = "auto",
    concurrency: Concurrency = 4,
    as_json: AsJson = False,
) -> None:
    """Score the steps of solutions that come from elsewhere; common prefixes are computed once."""
    from .backend import gib_to_bytes, load_verifier
    from .scoring import score_steps, summarise
    from .show import progress_bar
    from .solutions import load_solutions

    with friendly_errors():
        problems, solutions = load_solutions(solutions_file, limit)
        kv_bytes = gib_to_bytes(kv_gib)
        loaded = load_verifier(
            verifier, prm_family, dtype=dtype, kv_bytes=kv_bytes, reference=prm_reference, base=prm_base, device=device,
            weights=weights, kv=kv,
        )
        try:
            with progress_bar(err, "solutions") as progress:
                scored = score_steps(
                    problems, solutions, loaded, separator=separator.replace("\\n", "\n"), results=results,
                    concurrency=concurrency, progress=progress,
                )  # fmt: skip
        except KeyboardInterrupt:
            err.print(f"stopped; run again to continue {results}", highlight=False, markup=False)
            raise typer.Exit(INTERRUPTED) from None
        finally:
            loaded.close()
        _note_failures(loaded)
    summary = summarise(scored)
    if as_json:
        _print_json(summary | {"results": str(results)})
        return
    table = Table(show_header=False)
    for name, value in summary.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:.4f}")
    out.print(table)
    spoiled = next((each for group in scored for each in group if each.refused or each.error), None)
    if spoiled is not None:
        out.print(f"the first one without all its scores: {spoiled.refused or spoiled.error}", highlight=False, markup=False)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Results file a.")],
    second: Annotated[Path, typer.Argument(help="Results file b.")],
    as_json: AsJson = False,
) -> None:
    """Accuracy of b minus a over the problems they share, with a 95 % paired-bootstrap interval."""
    from dataclasses import asdict

    from .report import compare as compare_runs
    from .results import read_results

    with friendly_errors():
        found = compare_runs(read_results(first), read_results(second))
    if as_json:
        _print_json(asdict(found) | {"differs": found.differs})
        return
    verdict = "they differ" if found.differs else "no difference shown"
    out.print(
        f"{100 * found.difference:+.1f} points ({100 * found.low:+.1f} to {100 * found.high:+.1f}) "
        f"on {found.problems} problems; only a solves {found.only_a}, only b {found.only_b}: {verdict}",
        highlight=False,
    )


app.command()(calibrate)


def main() -> None:
    app()
