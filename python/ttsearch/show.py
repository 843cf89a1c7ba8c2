"""A search on the terminal: live progress, the tree of scored steps, the answer, one line of cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text
from rich.tree import Tree

from .aggregate import display_score, path_score
from .run import Progress
from .tree import walk
from .types import Cost, SearchNode, SearchResult

MAX_NODES = 60  # a larger tree is shown along its best path, the rest summed up
PROGRESS_SECONDS = 5.0  # between lines where there is no terminal
_TEXT_CHARS = 64


def progress_line(progress: Progress) -> Text:
    rate = progress.tokens_decoded / progress.seconds if progress.seconds > 0 else 0.0
    return Text(
        f"step {progress.step}  {progress.alive} growing  {progress.finished} finished  "
        f"{progress.tokens_decoded:,} tokens  {rate:,.0f} tokens/s  {progress.seconds:.1f} s"
    )


@contextmanager
def progress_bar(console: Console, what: str = "") -> Iterator[Callable[..., None]]:
    """Something to call with (done, total), and of what if not always the same: a bar for each on a terminal, a line every
    few seconds elsewhere.
    """
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        )  # fmt: skip
        with Bar(*columns, console=console) as bar:
            tasks: dict[str, TaskID] = {what: bar.add_task(what, total=None)} if what else {}

            def move(done: int, total: int, what: str = what) -> None:
                if what not in tasks:
                    tasks[what] = bar.add_task(what)
                bar.update(tasks[what], completed=done, total=total)

            yield move
        return
    last = -PROGRESS_SECONDS

    def line(done: int, total: int, what: str = what) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= PROGRESS_SECONDS:
            last = time.monotonic()
            console.print(f"{done:,} of {total:,} {what}", highlight=False)

    yield line


def cost_line(cost: Cost, seconds: float) -> str:
    decoded, reused = cost.policy.tokens_decoded, cost.policy.tokens_reused + cost.verifier.tokens_reused
    return (
        f"{decoded:,} tokens decoded, {reused:,} reused, {_si(cost.flops)}FLOP "
        f"(verifier {_si(cost.verifier.flops)}FLOP), {seconds:.2f} s, peak KV {_bytes(cost.peak_kv_bytes)}"
    )


def _si(value: float) -> str:
    for unit in ("", "k", "M", "G", "T", "P"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} E"


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.3g} {unit}" if unit != "B" else f"{value:.0f} B"
        value /= 1024
    return f"{value:.3g} GiB"


def render_result(result: SearchResult, max_nodes: int = MAX_NODES) -> Group:
    lines: list = [render_tree(result, max_nodes)] if result.root and result.root.children else []
    if result.interrupted:
        lines.append(Text("Interrupted: this is what was finished.", style="yellow"))
    answer = Text("Answer: ").append("none" if result.answer is None else result.answer, style="bold")
    if result.votes and result.answer is not None:
        total = "path" if result.num_voted == 1 else "paths"
        answer.append(f"   ({result.num_voted} {total} voted, {result.duplicates} duplicates)", style="dim")
    lines += [answer, Text(cost_line(result.cost, result.seconds), style="dim")]
    return Group(*lines)


def render_tree(result: SearchResult, max_nodes: int = MAX_NODES) -> Tree:
    """Steps with their scores: the best path bold, pruned branches dim."""
    best = {id(node) for node in result.best.path()} if result.best else set()
    kept = {id(node) for leaf in result.candidates for node in leaf.path()}
    tree = Tree(Text(_clip(result.problem.prompt)), guide_style="dim")
    everything = sum(1 for _ in walk(result.root)) - 1 <= max_nodes
    branches = [(result.root, tree)]  # no recursion: chains may be long
    while branches:
        node, branch = branches.pop()
        children = sorted(node.children, key=lambda child: child.path_key)
        shown = [child for child in children if everything or id(child) in best]
        for child in shown:
            style = "bold green" if id(child) in best else "" if id(child) in kept else "dim"
            branches.append((child, branch.add(_label(child, style, result))))
        for text in _summaries([child for child in children if child not in shown], kept, result):
            branch.add(Text(text, style="dim"))
    return tree


def _label(node: SearchNode, style: str, result: SearchResult) -> Text:
    score = "     " if node.step_score is None else f"{node.step_score:5.2f}"
    label = Text(f"{score}  {_clip(node.text)}", style=style)
    if node.finished:
        label.append(f"  [{node.finish_reason}{_path_score(node, result)}]", style="dim")
    return label


def _path_score(node: SearchNode, result: SearchResult) -> str:
    aggregate = result.budget.aggregate
    if aggregate is None or None in node.step_scores():
        return ""
    return f", {aggregate} {display_score(path_score(node, aggregate), aggregate):.3g}"


def _summaries(nodes: list[SearchNode], kept: set[int], result: SearchResult) -> list[str]:
    """One line for the pruned among `nodes`, one for the rest."""
    lines = []
    for name, group in (
        ("kept", [node for node in nodes if id(node) in kept]),
        ("pruned", [node for node in nodes if id(node) not in kept]),
    ):
        if group:
            scores = [node.step_score for node in group if node.step_score is not None]
            best = f", best step {max(scores):.2f}" if scores else ""
            lines.append(f"... {len(group)} more {name}{best}")
    return lines


def _clip(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _TEXT_CHARS else f"{text[: _TEXT_CHARS - 3]}..."
