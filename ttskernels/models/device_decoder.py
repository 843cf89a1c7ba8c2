"""The decoder on a GPU: cuBLAS for the weights, Triton for the rest, whole iterations as CUDA graphs.

Same interface as native.py. A decode iteration (layers, vocabulary head, sampling, stop automaton, the plan's next token) is
one graph for each padded number of rows. The host launches one ahead of the report it reads, and waits for nothing inside.
In the Triton interpreter the same calls run on CPU tensors, without a graph.
"""

from __future__ import annotations

import os
from collections import deque
from types import SimpleNamespace

import torch
from torch import Tensor

from ttskernels.attention_launches import attention_launches
from ttskernels.errors import BadLogitsError
from ttskernels.kv import plan_layout as at
from ttskernels.kv.plan import Plan
from ttskernels.kv.pool import PagePool
from ttskernels.models.config import DecoderConfig
from ttskernels.models.decoder import LM_HEAD
from ttskernels.models.device_inputs import DeviceInputs, LaunchPlan
from ttskernels.models.device_layers import own_layers, vendor_layers
from ttskernels.models.device_queue import DeviceQueue, Fetch, pool_name
from ttskernels.models.device_weights import layer_weights
from ttskernels.ops.rms_norm import rms_norm
from ttskernels.ops.sample import sample

# Rows of a captured iteration. Padding costs little as long as reading the weights takes longer than multiplying.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
LEAST_SLOTS = 1024  # partial records that a captured launch has room for; where a plan has more, a power of two
LINGER = 4  # iterations that the other rows go on for once the host knows that a row has ended
BAD_LOGITS = -(1 << 30)  # the state of a row whose logits were not finite
RING = 4  # reports kept on the device; the host reads one behind


def own_rows() -> int:
    """Most rows whose products are ours instead of the vendor's. Ours have not been measured on a GPU, so none by default."""
    text = os.environ.get("TTSK_GPU_LINEAR_ROWS", "0")
    if not text.isdecimal():
        raise ValueError(f"TTSK_GPU_LINEAR_ROWS must be a number of rows, 0 for none, got {text!r}")
    return int(text)


class DeviceDecoder:
    """Runs on `device`, on a stream of its own. Weights are copied there once; q, k, v and gate, up become one each."""

    captured_rows = BUCKETS[-1]  # a forward of more rows is launched op by op

    def __init__(self, config: DecoderConfig, weights: dict[str, Tensor], lm_head: bool, device: torch.device):
        self.config, self.device = config, device
        self.own_rows = own_rows()
        self.queue = DeviceQueue(device)
        with self.queue.current():  # who frees memory is who uses it
            self.inputs = DeviceInputs(device)
        self.embed = weights["model.embed_tokens.weight"].to(device)
        self.head = None
        if lm_head:
            self.head = weights[LM_HEAD].to(device) if LM_HEAD in weights else self.embed
        self.norm = weights["model.norm.weight"].to(device)
        self.layers = [layer_weights(config, weights, i, device) for i in range(config.layers)]
        self.inv_freq = config.inv_freq.to(device)
        self._tables: tuple[Tensor, Tensor] | None = None  # the stop automaton: the caller's, and its copy here
        self._report = torch.empty(RING, 3, BUCKETS[-1], dtype=torch.int32, device=device)  # of captured iterations

    def forward(
        self, ids: Tensor, plan: Plan, pool: PagePool, out_plan: Plan | None, out_rows: Tensor, output: str
    ) -> Tensor:
        """`ids` and `out_rows` on the host, the result on the device. `out_plan` serves above `captured_rows` rows."""
        with self.queue.current():
            chosen, cut = self.queue.put(out_rows), None
            if out_plan is not None and plan.num_rows > self.captured_rows:
                cut = out_plan.to(self.device), chosen
            rows, launch = self._prepare(plan)
            x = self.queue.run(
                self._key("forward", rows, launch, pool),
                lambda: self._body(self.inputs.device_views(rows), launch, pool, cut),
                lambda: self.inputs.upload(rows, plan, ids=ids),
                lambda: self.inputs.idle(rows),
            )
            if cut is None:
                x = x.index_select(0, chosen)
            result = x.float() if output == "hidden" else self._logits(x)
        return self.queue.give(result)

    def decode(self, ids, plan, pool, keys, params, next_state, states, tokens, logprobs) -> int:
        """Rows that end stay in the batch, idle, with token -1, while the others go on for up to LINGER iterations."""
        have, limit = plan.num_rows, tokens.shape[0]
        if not have or not limit:
            return limit
        with self.queue.current():
            rows, launch = self._prepare(plan)
            key = self._key("decode", rows, launch, pool, self._table(next_state).data_ptr())
            report = self._report if key else self._report.new_empty(RING, 3, rows)
            inputs = {
                "ids": ids, "states": states, "keys": keys, "params": params,
                "draw_rows": torch.arange(have, dtype=torch.int32), "draw_positions": plan.positions + 1,
            }  # fmt: skip

            def launch_iteration(number: int) -> Fetch:
                self.queue.run(
                    key,
                    lambda: self._iteration(self.inputs.device_views(rows), launch, pool, report),
                    lambda: None if number else self.inputs.upload(rows, plan, **inputs),
                    lambda: self.inputs.idle(rows),
                )
                return self.queue.fetch(report[number % RING])

            pending: deque[Fetch] = deque()
            launched = read = done = 0
            while launched < limit or pending:
                if launched < limit:
                    if launched and not plan.advance():  # no slot is left: the device would find none either
                        limit = launched
                        continue
                    pending.append(launch_iteration(launched))
                    launched += 1
                    if len(pending) == 1 and launched < limit:
                        continue
                token, chance, state = pending.popleft().wait()[:, :have]
                tokens[read], logprobs[read] = token, chance.view(torch.float32)
                states.copy_(state)
                torch.where(token < 0, ids, token, out=ids)
                read += 1
                if bool((token >= 0).any()):
                    done = read
                self._check(states, done)
                ended = states < 0
                if bool(ended.any()):
                    limit = min(limit, launched if bool(ended.all()) else read + LINGER)
            return done

    # -- what is launched --------------------------------------------------------------------------------------------

    def _body(self, fields: SimpleNamespace, plan, pool: PagePool, cut: tuple | None = None) -> Tensor:
        """Hidden states `[rows, hidden]` behind the last layer. `cut`: (plan, rows) that alone go through its second half."""
        x = torch.index_select(self.embed, 0, fields.ids)
        if cut is None and len(x) <= self.own_rows:
            return own_layers(self, x, fields, plan, pool)
        return vendor_layers(self, x, fields, plan, pool, cut)

    def _logits(self, x: Tensor) -> Tensor:
        x = rms_norm(x, self.norm, self.config.rms_eps, impl="triton")
        if x.is_cuda and x.dtype != torch.float32:
            return torch.mm(x, self.head.T, out_dtype=torch.float32)  # not rounded in between
        return (x @ self.head.T).float()

    def _iteration(self, fields: SimpleNamespace, plan: LaunchPlan, pool: PagePool, report: Tensor) -> None:
        from ttskernels._triton.decode_advance import decode_advance

        logits = self._logits(self._body(fields, plan, pool))
        token, chance = sample(
            logits, fields.draw_rows, fields.keys, fields.draw_positions, fields.params, impl="triton"
        )
        decode_advance(
            token, chance, self._tables[1], fields.plan, fields.ids, fields.positions, fields.slots,
            fields.draw_positions, fields.states, fields.iterations, report, BAD_LOGITS,
        )  # fmt: skip

    # -- what launches are bound to ----------------------------------------------------------------------------------

    def _prepare(self, plan: Plan) -> tuple[int, LaunchPlan]:
        """Padded rows, and the plan's place on the device."""
        have, slots = plan.num_rows, plan.header[at.NUM_SLOTS]
        rows = next((bucket for bucket in BUCKETS if bucket >= have), have)
        if self.inputs.reserve(rows, plan):
            self.queue.forget_graphs()
        room = max(LEAST_SLOTS, 1 << max(0, slots - 1).bit_length())
        return rows, LaunchPlan(plan, self.inputs.plan_view(rows), rows, room)

    def _key(self, name: str, rows: int, launch: LaunchPlan, pool: PagePool, *more: int) -> tuple | None:
        """What a captured launch keeps: sizes, addresses (a layer's depends on the pool's pages), what pages hold, and how
        attention reads them. None: too many rows to be worth it."""
        if rows > self.captured_rows:
            return None
        launches = attention_launches(launch.header)
        pages = pool.k.data_ptr(), pool.v.data_ptr(), tuple(pool.k.shape), pool.k.dtype
        return id(self), name, rows, launch.header[at.CAP_MERGES], launches, pages, pool_name(pool), *more

    def _table(self, next_state: Tensor) -> Tensor:
        if self._tables is None or self._tables[0] is not next_state:
            self._tables = next_state, self.queue.put(next_state)
        return self._tables[1]

    @staticmethod
    def _check(states: Tensor, iterations: int) -> None:
        bad = (states == BAD_LOGITS).nonzero()
        if len(bad):
            row = int(bad[0])
            raise BadLogitsError(
                f"logits of row {row} are not finite after {iterations} iterations; the weights overflow or are "
                "damaged: try dtype fp32, or load the checkpoint again",
                row,
            )
