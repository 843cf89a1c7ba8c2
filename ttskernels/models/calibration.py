"""Calibrated int8 weights: what a model's matrices meet while it reads text decides how they are rounded.

The text is the model's own, sampled from its first token on, so that nothing else is needed; or ids of the caller's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ttskernels import _dispatch
from ttskernels.kv.forest import Forest
from ttskernels.kv.plan import build_plan
from ttskernels.kv.pool import PAGE_SIZE, PagePool
from ttskernels.models.calibrated import CalibrationError, is_calibrated, keep_calibration
from ttskernels.models.decoder import LM_HEAD, PythonDecoder
from ttskernels.models.loading import Checkpoint, load_checkpoint
from ttskernels.models.model import Model, make_decoder
from ttskernels.models.rounding import round_weight, second_moments
from ttskernels.models.weights import read_json
from ttskernels.ops.linear import Rounded

TEXTS, TOKENS = 32, 256  # the model's own, and the length of each
FIRST = "self_attn.k_proj"  # of a layer's matrices
ITERATIONS = 16  # of writing, between reports and looks for a Ctrl-C

Progress = Callable[[int, int, str], None]  # (done, total, of what)


def calibrate(
    source: str | os.PathLike,
    dtype: torch.dtype = torch.bfloat16,
    *,
    texts: Sequence[Sequence[int]] | None = None,
    base: str | os.PathLike | None = None,
    progress: Progress | None = None,
) -> Path:
    """Round a model's matrices to int8 for what it meets while the model reads text, see `rounding`.

    `load_model(source, dtype, weights="calibrated")` then finds what came out by the weights themselves, in files under the
    user's cache folder (TTSK_CACHE). A verifier that is a plain language model shares those of the policy.

    Args:
        source, dtype, base: as in `load_model`.
        texts: token ids, all read at once: memory grows with them, 8,192 are enough. None: 32 texts of 256 tokens that the
            model writes itself, at temperature 1.
        progress: called with how many of all "tokens" are written and of all "layers" rounded: at the beginning, now and
            then or at every layer, and at the end.
    Returns:
        The file of the layers; the vocabulary head has one of its own beside it.
    Raises:
        ValueError: an id outside the vocabulary; no `texts` for a model without a vocabulary head.
        CalibrationError: an activation is not finite; the file cannot be written.
        FileNotFoundError, ConnectionError: as `load_model`.
    """
    checkpoint = load_checkpoint(source, dtype, base=base)
    if texts is None:
        if not checkpoint.keeps_lm_head:
            raise ValueError(f"texts must hold token ids for {source}, got None: it has a score head, and writes no text itself")
        texts = own_texts(checkpoint, progress=progress)
    texts = [list(ids)[: checkpoint.config.max_positions] for ids in texts if len(ids)]
    if not texts:
        raise ValueError("texts must hold token ids, got none")
    return keep_calibration(checkpoint, _observe(checkpoint, texts, progress))


def own_texts(
    checkpoint: Checkpoint, texts: int = TEXTS, tokens: int = TOKENS, progress: Progress | None = None
) -> list[list[int]]:
    """Token ids that a language model samples at temperature 1, with keys 0, 1, ..., from its first token on."""
    config = checkpoint.config
    model = Model(checkpoint, *make_decoder(checkpoint, "auto", True, weights="float"))
    length = min(tokens, config.max_positions) - 1
    first = _first_token(checkpoint)
    pool = model.new_pool(texts * (tokens // PAGE_SIZE + 1))
    forest = Forest(pool)
    nodes = [forest.add(None, [first]) for _ in range(texts)]
    forest.reserve(nodes, length)
    plan = build_plan(forest, [(node, 0, 1) for node in nodes], model.heads)
    ids, states = torch.full((texts,), first, dtype=torch.int32), torch.zeros(texts, dtype=torch.int32)
    keys, params = torch.arange(texts), torch.tensor([[1.0, 0, 1, 0]]).repeat(texts, 1)
    never_ends = torch.zeros(1, config.vocab, dtype=torch.int32)
    written, logprobs = torch.zeros(length, texts, dtype=torch.int32), torch.zeros(length, texts)
    for at in range(0, length, ITERATIONS):
        part = slice(at, at + ITERATIONS)
        if progress is not None:
            progress(at * texts, length * texts, "tokens")
        if at:
            plan.advance()
        model.decode(ids, plan, pool, keys, params, never_ends, states, written[part], logprobs[part])
    if progress is not None:
        progress(length * texts, length * texts, "tokens")
    return [[first, *ids] for ids in written.T.tolist()]


def _first_token(checkpoint: Checkpoint) -> int:
    """config.json's bos_token_id, else an end of text, else 0."""
    file = checkpoint.folder / "config.json"
    ids = [read_json(file).get("bos_token_id") if file.is_file() else None, *checkpoint.config.eos_ids]
    return next((i for i in ids if isinstance(i, int) and 0 <= i < checkpoint.config.vocab), 0)


def _observe(checkpoint: Checkpoint, texts: list[list[int]], progress: Progress | None) -> dict[str, Rounded]:
    config = checkpoint.config
    ids = torch.tensor([i for text in texts for i in text])
    if not 0 <= int(ids.min()) <= int(ids.max()) < config.vocab:
        raise ValueError(f"texts must be token ids in 0..{config.vocab - 1}, got {int(ids.min())}..{int(ids.max())}")
    pages = sum(-(-len(text) // PAGE_SIZE) for text in texts)
    pool = PagePool(config.layers, config.kv_heads, config.head_dim, pages, config.dtype)
    forest = Forest(pool)
    nodes = [forest.add(None, text) for text in texts]
    forest.reserve(nodes, 0)
    plan = build_plan(forest, [(node, 0, len(node.ids)) for node in nodes], config.heads)
    observer = _Observer(checkpoint, "reference" if _dispatch.load_extension() else "cpu", progress)
    rows = torch.arange(len(ids), dtype=torch.int32)
    observer.forward(ids.int(), plan, pool, None, rows, "logits" if checkpoint.keeps_lm_head else "hidden")
    if progress is not None:
        progress(config.layers, config.layers, "layers")
    return observer.rounded


class _Observer(PythonDecoder):
    """A float decoder that rounds a matrix when its inputs come by, and returns nothing of meaning."""

    def __init__(self, checkpoint: Checkpoint, impl: str, progress: Progress | None):
        super().__init__(checkpoint.config, checkpoint.weights, impl, lm_head=False)
        self.weights, self.progress = checkpoint.weights, progress
        self.rounded: dict[str, Rounded] = {}
        self._seen: tuple[Tensor, Tensor] | None = None  # inputs, and their moments: several matrices share both

    def _linear(self, layer: int, name: str, x: Tensor) -> Tensor:
        if self.progress is not None and name == FIRST:
            self.progress(layer, self.config.layers, "layers")
        if is_calibrated(weight := f"model.layers.{layer}.{name}.weight"):
            self._round(weight, x)
        return super()._linear(layer, name, x)

    def _logits(self, x: Tensor) -> Tensor:
        self._round(LM_HEAD, x)
        return x

    def _round(self, name: str, x: Tensor) -> None:
        if self._seen is None or self._seen[0] is not x:
            self._seen = (x, second_moments(x))
        try:
            self.rounded[name] = round_weight(self.weights.get(name, self.embed), self._seen[1])
        except (ValueError, torch.linalg.LinAlgError) as error:
            raise CalibrationError(f"{name} cannot be calibrated: {error}") from error
