"""Draw a scored search tree to SVG or PNG (extra `plot`: matplotlib)."""

from __future__ import annotations

from pathlib import Path

from .tree import walk
from .types import SearchNode, SearchResult


def layout(root: SearchNode) -> dict[SearchNode, tuple[float, float]]:
    """Node -> (depth, height): leaves one apart in path-key order, a parent in the middle of its children."""
    nodes = list(walk(root))
    height: dict[SearchNode, float] = {}
    for node in nodes:
        if not node.children:
            height[node] = float(len(height))
    for node in reversed(nodes):  # children before parents
        if node.children:
            height[node] = sum(height[child] for child in node.children) / len(node.children)
    return {node: (float(len(node.path_key)), -height[node]) for node in nodes}


def plot_path(path: str | Path) -> Path:
    """The path, if a tree can be drawn there.

    Raises:
        ValueError: no matplotlib, an ending that it does not write, or a folder that is not there.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ValueError("plot_tree needs matplotlib; `pip install ttskernels[plot]`") from None
    path, endings = Path(path), sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix[1:].lower() not in endings:
        raise ValueError(f"the tree's file must end in .{', .'.join(endings)}, got {str(path)!r}; .svg is a good choice")
    if not path.parent.is_dir():
        raise ValueError(f"the tree's file must be in a folder that exists, got {str(path)!r}; make {path.parent} first")
    return path


def plot_tree(result: SearchResult, path: str | Path, *, size: tuple[float, float] | None = None) -> Path:
    """Steps from left to right, coloured by score; pruned branches faint, the best path wide, answers at its
    leaves.

    The file's ending chooses the format. Returns the path written.

    Raises:
        ValueError: see `plot_path`; or a result without a step.
    """
    path = plot_path(path)
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    if result.root is None or not result.root.children:
        raise ValueError("plot_tree needs a result with a tree; this one has no step")
    at = layout(result.root)
    best = set(result.best.path()) if result.best else set()
    kept = {node for leaf in result.candidates for node in leaf.path()}
    rows = max(-y for _, y in at.values()) + 1
    columns = max(x for x, _ in at.values())
    figure = Figure(
        figsize=size or (min(2 + 1.3 * columns, 24), min(0.8 + 0.22 * rows, 24)), layout="constrained"
    )
    axes = figure.add_subplot()
    axes.axis("off")
    for node in at:
        if node.parent is None:
            continue
        (x0, y0), (x1, y1) = at[node.parent], at[node]
        middle = (x0 + x1) / 2
        axes.plot(
            [x0, middle, middle, x1], [y0, y0, y1, y1], solid_joinstyle="round",
            color="#1a7f37" if node in best else "#57606a", zorder=2 if node in best else 1,
            linewidth=2.4 if node in best else 1.0, alpha=1.0 if node in kept else 0.25,
        )  # fmt: skip
    steps = [node for node in at if node.parent is not None]
    scored = [node.step_score for node in steps if node.step_score is not None]
    scale = Normalize(min([0.0, *scored]), max([1.0, *scored]))
    for group, alpha in ((set(steps) - kept, 0.35), (kept, 1.0)):
        nodes = [node for node in steps if node in group]
        if nodes:
            values = [0.5 if node.step_score is None else node.step_score for node in nodes]
            dots = axes.scatter(
                *zip(*(at[node] for node in nodes), strict=True),
                c=values,
                cmap="RdYlGn",
                norm=scale,
                s=46,
                zorder=3,
                alpha=alpha,
                edgecolors="#24292f",
                linewidths=[1.4 if node in best else 0.5 for node in nodes],
            )
    axes.plot(*at[result.root], marker="s", color="#24292f", markersize=7, zorder=3)
    _write_answers(axes, at, result, best)
    if scored:
        figure.colorbar(dots, ax=axes, shrink=0.6, label="step score")
    figure.savefig(path)
    return path


def _write_answers(axes, at, result: SearchResult, best: set[SearchNode]) -> None:
    from .answers import extract_answer

    for leaf in result.candidates:
        answer = extract_answer(leaf.path_text()) if leaf.solved else None
        if answer is not None:
            axes.annotate(
                answer.replace("$", r"\$"),
                at[leaf],
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                weight="bold" if leaf in best else "normal",
            )
