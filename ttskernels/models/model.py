"""A loaded model: configuration, head and the decoder that runs it, behind one interface with checked arguments."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from ttskernels import _dispatch
from ttskernels.errors import UnavailableError
from ttskernels.kv.plan import Plan
from ttskernels.kv.plan_layout import HeadShape, Machine
from ttskernels.kv.pool import ByteBudget, PagePool
from ttskernels.layout import FIXED
from ttskernels.layout import FORMS as KV_FORMS
from ttskernels.models.calibrated import read_calibration
from ttskernels.models.config import DecoderConfig, FlopsOutput
from ttskernels.models.decoder import CALIBRATED, NONE_ROUNDED, Decoder, Forms, PythonDecoder
from ttskernels.models.device import check_float8, device_machine
from ttskernels.models.device_queue import DeviceQueue, pool_name
from ttskernels.models.heads import ScoreHead
from ttskernels.models.loading import Checkpoint
from ttskernels.ops.linear import Form
from ttskernels.ops.sample import check_params, check_tokens, sample

Output = Literal["logits", "hidden"]
Weights = Literal["auto", "float", "int16", "int8", "calibrated"]
Kv = Literal["auto", "float", "int16", "int8", "fp8"]


class Model:
    """A policy (`head` is None) or a process reward model over plans and a page pool.

    `norm` is the final norm's weight in float32, which `step_score` applies to `output="hidden"`. `lm_head` holds the
    vocabulary rows `[vocab, hidden]`, or None if the model was loaded without: then nothing keeps them. On a GPU all are
    there, and what `forward` returns is, too; everything that is passed in stays on the host.

    `queue` orders the model's work on its device; `machine` is what plans for it are built with.
    """

    def __init__(self, checkpoint: Checkpoint, decoder: Decoder, impl: str):
        self.config: DecoderConfig = checkpoint.config
        self.impl = impl
        self._decoder = decoder
        self.queue = getattr(decoder, "queue", None) or DeviceQueue(torch.device("cpu"))
        self.device = self.queue.device
        # None: the planner takes this CPU's
        self.machine: Machine | None = device_machine(self.device, self.heads) if impl == "triton" else None
        self.reserves_pool = self.device.type == "cuda"  # memory of a pool is taken when it is made, not when it is written
        self.head: ScoreHead | None = None if checkpoint.head is None else checkpoint.head.to(self.device)
        norm = checkpoint.weights.get("model.norm.weight")
        self.norm = None if norm is None else norm.to(self.device, torch.float32)
        self.lm_head: Tensor | None = None
        if checkpoint.keeps_lm_head:
            embed = checkpoint.weights["model.embed_tokens.weight"]
            self.lm_head = checkpoint.weights.get("lm_head.weight", embed)
            if impl == "triton":
                self.lm_head = decoder.head  # the copy on the device

    def share_queue(self, other: Model) -> None:
        """Run in one order with `other`, whose results this model's are used with."""
        self.queue = other.queue
        if self.impl == "triton":
            self._decoder.queue = other.queue

    def forget_pool(self, pool: PagePool) -> None:
        """Drop what was captured for a pool, which is about to be freed."""
        if self.reserves_pool:
            self.queue.forget_graphs(pool_name(pool))

    @property
    def kv_bytes_per_token(self) -> int:
        return self.config.kv_bytes_per_token

    def flops(self, first: int, rows: int = 1, output: FlopsOutput = "logits") -> float:
        """See `DecoderConfig.flops`; the vocabulary head counts only if the model has one."""
        return self.config.flops(first, rows, "hidden" if output == "logits" and self.lm_head is None else output)

    @property
    def heads(self) -> HeadShape:
        """What `build_plan` needs to know about this model."""
        return self.config.heads

    def new_pool(self, num_pages: int, budget: ByteBudget | None = None, models: int = 1) -> PagePool:
        """A KV page pool of this model's shape and dtype, with layers for so many `models` of it, one after the other.

        `budget` may be shared with another model's pool.
        """
        c = self.config
        return PagePool(
            models * c.layers, c.kv_heads, c.head_dim, num_pages, c.dtype, budget,
            device=self.device, strided=self.impl == "triton", form=c.kv_form,
        )  # fmt: skip

    def forward(
        self, ids: Tensor, plan: Plan, pool: PagePool, out_rows: Tensor, output: Output = "logits"
    ) -> Tensor:
        """Run the query rows of `plan`; writes the K and V of rows that are not cached yet into `pool`.

        Args:
            ids: `[rows]` int32, the caller's row order.
            out_rows: `[n]` int32, rows whose result is wanted; the last layer and the head run for these alone.
            output: "logits", or "hidden" before the final norm.
        Returns:
            `[n, vocab]` or `[n, hidden]` float32, on the model's device.
        Raises:
            ValueError: a shape or dtype mismatch, an id outside the vocabulary, a position past `max_positions`.
        """
        if output not in ("logits", "hidden"):
            raise ValueError(f"output must be 'logits' or 'hidden', got {output!r}")
        if output == "logits" and self.lm_head is None:
            raise ValueError(
                "output must be 'hidden': this model was loaded with a score head and no vocabulary head; "
                "pass keep_lm_head=True to load_model if it is a policy too"
            )
        self._check_rows(ids, plan, pool)
        _check_index("out_rows", out_rows, plan.num_rows)
        every = len(out_rows) == plan.num_rows and bool((out_rows.diff() == 1).all())
        whole = every or plan.num_rows <= getattr(self._decoder, "captured_rows", 0)
        out_plan = None if whole else plan.of_rows(out_rows.numpy())
        return self._decoder.forward(ids, plan, pool, out_plan, out_rows, output)

    def decode(
        self,
        ids: Tensor,
        plan: Plan,
        pool: PagePool,
        keys: Tensor,
        params: Tensor,
        next_state: Tensor,
        states: Tensor,
        tokens: Tensor,
        logprobs: Tensor,
    ) -> int:
        """Decode all rows together until one of them needs the caller; returns the number of iterations done.

        An iteration appends the KV of `ids`, samples one token per row at position row_pos + 1, writes it to `tokens`,
        `logprobs` and `ids`, and sets `states = next_state[states, token]`. It stops after an iteration in which a
        state turned negative, when a row has no reserved slot for its new token, at `max_positions`, or when `tokens`
        is full. On return the last sampled tokens are in `ids`; their KV is not in the pool yet.

        On a GPU the other rows go on for a few iterations when a row has ended. Its `tokens` are -1 from then on, and
        its state and its entry of `ids` stay what they were.

        Args:
            ids, states: `[rows]` int32, updated.
            plan: one row per branch, advanced once between iterations.
            keys, params: `[rows]` int64 and `[rows, 4]` float32, as in op `sample`.
            next_state: `[automaton states, vocab]` int32.
            tokens, logprobs: `[iterations, rows]` int32 and float32, filled from the top.
        Raises:
            ValueError: a shape or dtype mismatch, an id outside the vocabulary, a position past `max_positions`.
        """
        if self.lm_head is None:
            raise ValueError(
                "decode needs a vocabulary head; this model was loaded with a score head instead: "
                "pass keep_lm_head=True to load_model if it is a policy too"
            )
        rows = plan.num_rows
        last = self._check_rows(ids, plan, pool)
        _check("keys", keys, (rows,), torch.int64)
        _check("params", params, (rows, 4), torch.float32)
        check_params(params)
        _check("next_state", next_state, (next_state.shape[0], self.config.vocab), torch.int32)
        _check("states", states, (rows,), torch.int32)
        _check_index("states", states, next_state.shape[0])
        _check("tokens", tokens, (tokens.shape[0], rows), torch.int32)
        _check("logprobs", logprobs, tuple(tokens.shape), torch.float32)
        limit = min(tokens.shape[0], self.config.max_positions - last)
        return self._decoder.decode(
            ids, plan, pool, keys, params, next_state, states, tokens[:limit], logprobs[:limit]
        )

    def sample(self, logits: Tensor, rows: Tensor, keys: Tensor, positions: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Op `sample` over logits that `forward` returned; the other arguments and the results are on the host.

        Raises:
            ValueError: as op `sample`; BadLogitsError, which is one: a row of logits is not finite.
        """
        check_params(params)
        with self.queue.current():
            drawn = sample(logits, *(self.queue.put(t) for t in (rows, keys, positions, params)))
            tokens, logprobs = (fetch.wait() for fetch in [self.queue.fetch(t) for t in drawn])
        check_tokens(tokens, rows)
        return tokens, logprobs

    def _check_rows(self, ids: Tensor, plan: Plan, pool: PagePool) -> int:
        """Refuse what would read out of bounds; returns the largest position of a row."""
        c = self.config
        shape, own = (pool.layers, pool.kv_heads, pool.head_dim), (c.layers, c.kv_heads, c.head_dim)
        if shape != own or (pool.dtype, pool.form) != (c.dtype, c.kv_form):
            raise ValueError(
                f"pool must have (layers, kv_heads, head_dim) {own} and {c.dtype} in form {c.kv_form!r}, "
                f"got {shape} and {pool.dtype} in form {pool.form!r}; take it from model.new_pool"
            )
        _check("ids", ids, (plan.num_rows,), torch.int32)
        if plan.num_rows == 0:
            return 0
        _check_index("ids", ids, c.vocab, "token ids of this model's vocabulary")
        last = int(plan.row_pos.max())
        if last >= c.max_positions:
            raise ValueError(
                f"positions must stay below max_positions = {c.max_positions}, got a row at {last}; shorten the prompt"
            )
        return last


def check_impl(impl: str) -> None:
    """Raise where an implementation is unknown, or cannot run here."""
    if impl not in _dispatch.IMPLS:
        raise ValueError(f"impl must be one of {_dispatch.IMPLS}, got {impl!r}")
    if impl != "auto" and (reason := _dispatch.available(impl)):
        raise UnavailableError(f"impl {impl!r} is not available: {reason}")


def integers_are_faster(impl: str, dtype: torch.dtype) -> bool:
    """Whether "auto" means int16, which is at least as accurate as bf16. avx512_bf16 is in use where its own dot product is as
    fast; not measured on AArch64."""
    native = impl in ("auto", "cpu") and _dispatch.load_extension() is None
    return native and dtype == torch.bfloat16 and _dispatch.isa_name() in ("avx2", "avx512", "avx512_vnni")


def forms_of(form: Form | Literal["calibrated"], impl: str, dtype: torch.dtype) -> Forms:
    """An int8 model keeps what would cost most of the accuracy in two bytes: k and v in int16, down in what is faster. A
    calibrated one keeps nothing so."""
    if form == "calibrated":
        return CALIBRATED
    if form != "int8":
        return Forms(form, form, form)
    return Forms("int8", "int16", "float" if dtype == torch.bfloat16 and not integers_are_faster(impl, dtype) else "int16")


def with_kv(checkpoint: Checkpoint, kv: str, impl: str, device: torch.device | None = None) -> Checkpoint:
    """The checkpoint with the form of its pages decided."""
    if kv not in ("auto", *KV_FORMS):
        raise ValueError(f"kv must be one of {('auto', *KV_FORMS)}, got {kv!r}")
    if impl == "triton" and kv in FIXED:
        raise ValueError(f'kv must be "auto", "float" or "fp8" on a GPU, got {kv!r}')
    if impl != "triton" and kv == "fp8":
        raise ValueError(f'kv must be "auto", "float", "int16" or "int8" on a CPU, got {kv!r}; pass device="cuda" for it')
    if kv == "fp8":
        check_float8(device or torch.device("cpu"))
    if kv == "auto":
        kv = "int16" if integers_are_faster(impl, checkpoint.config.dtype) else "float"
    return replace(checkpoint, config=replace(checkpoint.config, kv_form=kv))


def make_decoder(
    checkpoint: Checkpoint,
    impl: str,
    lm_head: bool,
    device: torch.device | None = None,
    weights: Weights = "auto",
) -> tuple[Decoder, str]:
    """The decoder that runs a checkpoint, and its implementation; without `lm_head` it gives hidden states alone."""
    if weights not in get_args(Weights):
        raise ValueError(f"weights must be one of {get_args(Weights)}, got {weights!r}")
    if impl == "triton":
        if weights not in ("auto", "float"):
            raise ValueError(f'weights must be "auto" or "float" on a GPU, got {weights!r}')
        from ttskernels.models.device_decoder import DeviceDecoder

        where = device or torch.device("cpu")  # there, the interpreter
        return DeviceDecoder(checkpoint.config, checkpoint.weights, lm_head, where), impl
    rounded = read_calibration(checkpoint, lm_head) if weights == "calibrated" else NONE_ROUNDED
    if impl in ("auto", "cpu") and _dispatch.load_extension() is None:
        from ttskernels.models.native import NativeDecoder

        if weights == "auto":
            weights = "int16" if integers_are_faster(impl, checkpoint.config.dtype) else "float"
        forms = forms_of(weights, impl, checkpoint.config.dtype)
        return NativeDecoder(checkpoint.config, checkpoint.weights, lm_head, forms, rounded), "cpu"
    resolved = "reference" if impl == "auto" else impl
    forms = forms_of("float" if weights == "auto" else weights, impl, checkpoint.config.dtype)
    return PythonDecoder(checkpoint.config, checkpoint.weights, resolved, lm_head, forms, rounded), resolved


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(f"{name} must be {list(shape)} {dtype}, got {list(tensor.shape)} {tensor.dtype}")


def _check_index(name: str, index: Tensor, size: int, what: str = "indices") -> None:
    if index.dtype != torch.int32 or index.ndim != 1:
        raise ValueError(f"{name} must be a 1-D int32 tensor, got {list(index.shape)} {index.dtype}")
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < size:
        raise ValueError(
            f"{name} must be {what} in 0..{size - 1}, got {int(index.min())}..{int(index.max())}"
        )
