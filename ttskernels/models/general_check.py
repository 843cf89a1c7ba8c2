"""Whether a transformers model is one that pages and tree attention can serve: asked of its configuration and by running it.

Some models call the attention function and are wrong nevertheless (layers with a state of their own, windows that are only
in the mask), so nothing is believed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttskernels.kv.forest import Forest
from ttskernels.kv.plan import build_plan
from ttskernels.models.config import LENGTH_ROPE_TYPES
from ttskernels.models.general_attention import running

KINDS = {"full_attention", "sliding_attention"}
TOLERANCE = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}  # of logits, as a share of their norm


class Shape(NamedTuple):
    """What every layer's attention has in common; `windows` of each layer, 0 for none."""

    q_heads: int
    kv_heads: int
    head_dim: int
    v_dim: int
    windows: tuple[int, ...]


class Probe:
    """A run without pages: causal attention over the rows of the forward, and a record of every call."""

    def __init__(self):
        self.calls: list[tuple[int, Shape]] = []

    def __call__(self, layer, q, k, v, scale, window, softcap, sinks) -> Tensor:
        rows, q_heads, dim = q.shape
        self.calls.append((layer, Shape(q_heads, k.shape[1], dim, v.shape[2], (window,))))
        k, v = (t.repeat_interleave(q_heads // t.shape[1], 1).float() for t in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q.float(), k) * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        hidden = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks[:, None, None].expand(-1, rows, 1)], 2)
        weights = scores.softmax(2)[..., :rows]
        return torch.einsum("hij,jhd->ihd", weights, v).to(q.dtype)


def check_config(config: Any) -> int:
    """Longest path that the model may have, by its text configuration.

    Raises:
        ValueError: layers of a kind that keeps a state of its own, or reads by chunks; no limit of positions.
    """
    kind = config.model_type
    if unknown := set(getattr(config, "layer_types", None) or ()) - KINDS:
        raise ValueError(f"layer_types of a {kind} model must be {' or '.join(sorted(KINDS))}, got {', '.join(sorted(unknown))}")
    if getattr(config, "attention_chunk_size", None):
        raise ValueError(f"attention_chunk_size must be null, got {config.attention_chunk_size}: {kind} reads tokens by chunks")
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        raise ValueError(f"max_position_embeddings of a {kind} model must say how long a path may be, got {limit!r}")
    rope = getattr(config, "rope_parameters", None) or {}
    for entry in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if entry.get("rope_type") in LENGTH_ROPE_TYPES:  # turns the keys of a longer path otherwise, those in the cache, too
            limit = min(limit, entry.get("original_max_position_embeddings") or limit)
    return limit


def probe(hf, config: Any) -> Shape:
    """The shape of a model's attention, from one short forward.

    Raises:
        ValueError: not every layer attends exactly once, or layers differ in shape, or a window is not passed on.
    """
    run, kind, layers = Probe(), config.model_type, config.num_hidden_layers
    with running(run), torch.no_grad():
        forward(hf, torch.arange(1, 4) % config.vocab_size, torch.arange(3))
    if [layer for layer, _ in run.calls] != list(range(layers)):
        seen = ", ".join(str(layer) for layer, _ in run.calls) or "none"
        raise ValueError(
            f"each of the {layers} layers of a {kind} model must attend once in a forward, in order; transformers asked for "
            f"layers: {seen}. Layers with a state of their own, or several attentions, cannot share pages"
        )
    shapes = {shape._replace(windows=()) for _, shape in run.calls}
    if len(shapes) > 1:
        raise ValueError(f"all layers of a {kind} model must have heads of the same shape, got {sorted(shapes)}")
    windows = tuple(shape.windows[0] for _, shape in run.calls)
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and not any(windows) and window < config.max_position_embeddings:
        raise ValueError(f"sliding_window {window} of a {kind} model must reach its attention, which got none")
    return shapes.pop()._replace(windows=windows)


def check_forks(model, hf, expected: Tensor, ids: list[int]) -> None:
    """Run `ids` on pages, as a chain of nodes beside another branch, and compare the logits behind the last with those that
    transformers' own attention gave for them.

    Raises:
        ValueError: they differ by more than rounding.
    """
    pool = model.new_pool(8)
    forest = Forest(pool)
    cut = len(ids) // 2
    root = forest.add(None, ids[:cut])
    leaves = [forest.add(root, ids[cut:]), forest.add(root, [ids[0]] * 3)]
    for nodes in ([root], leaves):  # the second forward reads what the first one wrote
        forest.reserve(nodes, 0)
        rows = [(node, 0, len(node.ids)) for node in nodes]
        plan = build_plan(forest, rows, model.heads, machine=model.machine)
        tokens = torch.tensor([i for node in nodes for i in node.ids], dtype=torch.int32)
        last = torch.tensor([len(nodes[0].ids) - 1], dtype=torch.int32)
        logits = model.forward(tokens, plan, pool, last)
        forest.mark_cached(nodes)
    error = float((logits[0].cpu() - expected).norm() / expected.norm())
    if not error <= TOLERANCE[model.config.dtype]:
        raise ValueError(
            f"a {model.config.model_type} model must give the same logits over forked pages as with transformers' own attention; "
            f"they differ by {error:.1%} of their norm, so something in it depends on more than the tokens that attention reads"
        )


def forward(hf, ids: Tensor, positions: Tensor, **options):
    """One row of tokens through a transformers model."""
    where = {"input_ids": ids[None].long().to(hf.device), "position_ids": positions[None].long().to(hf.device)}
    return hf(**where, use_cache=False, **options)
