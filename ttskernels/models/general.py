"""Any decoder of transformers over our pages: its own modules compute, `tree_attention` attends, branches fork as anywhere.

For what the fused decoder does not know. A layer costs some 25 small operations of PyTorch besides its products, and rows
are rounded as PyTorch rounds them at each batch size: results agree within rounding, not to the last bit.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ttskernels.kv.plan import Plan
from ttskernels.kv.pool import PagePool
from ttskernels.models.config import FlopsOutput, ModelConfig
from ttskernels.models.decoder import SteppedDecoder
from ttskernels.models.device_queue import DeviceQueue
from ttskernels.models.general_attention import PagedRun, running
from ttskernels.models.general_check import Shape, forward

WIDTHS = 16  # heads are filled up to a multiple of this


@dataclass(frozen=True, eq=False, kw_only=True)
class GeneralConfig(ModelConfig):
    """`layer_weights`: matrix elements that a token is multiplied by outside of the vocabulary head, experts by the share that
    it is sent to. `windows` of each layer, 0 for none."""

    layer_weights: int
    windows: tuple[int, ...]

    def flops(self, first: int, rows: int = 1, output: FlopsOutput = "logits") -> float:
        head = self.hidden * self.vocab if output == "logits" else 0  # "kv": whole rows are computed all the same
        attention = sum(self.attention_products(first, rows, window) for window in self.windows)
        return 2.0 * (rows * (self.layer_weights + head) + attention)


class GeneralDecoder(SteppedDecoder):
    """Runs a transformers model on the device it is on. See `Decoder`."""

    captured_rows = 1 << 30  # no plan for the last layer alone is of use here

    def __init__(self, hf, impl: str):
        self.hf, self.impl, self.queue = hf, impl, DeviceQueue(hf.device)
        self.head = hf.get_output_embeddings().weight
        self._keeps = "logits_to_keep" in inspect.signature(hf.forward).parameters

    def forward(
        self, ids: Tensor, plan: Plan, pool: PagePool, out_plan: Plan | None, out_rows: Tensor, output: str
    ) -> Tensor:
        device, positions = self.hf.device, plan.positions
        with self.queue.current(), torch.no_grad():
            rows = out_rows.long().to(device)
            placed = plan if device.type == "cpu" else plan.to(device)
            with running(PagedRun(pool, placed, positions.to(device), plan.slots.to(device), self.impl)):
                if output == "hidden":
                    result = forward(self.hf.base_model, ids, positions).last_hidden_state[0, rows]
                elif self._keeps:
                    result = forward(self.hf, ids, positions, logits_to_keep=rows).logits[0]
                else:
                    result = forward(self.hf, ids, positions).logits[0, rows]
            result = result.float()
        return self.queue.give(result)


def general_config(hf, config: Any, shape: Shape, limit: int, eos_ids: tuple[int, ...]) -> GeneralConfig:
    """What the engine and the planner need to know."""
    width = -(-max(shape.head_dim, shape.v_dim) // WIDTHS) * WIDTHS
    if width > 256:
        raise ValueError(f"heads of a {config.model_type} model must be at most 256 wide, got {width}")
    head = hf.get_output_embeddings().weight
    return GeneralConfig(
        vocab=len(head), hidden=head.shape[1], layers=config.num_hidden_layers, q_heads=shape.q_heads,
        kv_heads=shape.kv_heads, head_dim=width, max_positions=limit, dtype=head.dtype, eos_ids=eos_ids,
        model_type=config.model_type, layer_weights=layer_weights(hf, config), windows=shape.windows,
    )  # fmt: skip


def layer_weights(hf, config: Any) -> int:
    experts = next((n for name in ("num_local_experts", "num_experts", "n_routed_experts") if (n := getattr(config, name, 0))), 1)
    chosen = getattr(config, "num_experts_per_tok", 0) or experts
    tables = {id(part.weight) for part in (hf.get_input_embeddings(), hf.get_output_embeddings())}
    total = 0
    for name, weight in hf.named_parameters():
        if weight.ndim > 1 and id(weight) not in tables:
            total += weight.numel() * chosen // experts if ".experts." in name else weight.numel()
    return total
