"""vLLM's CPU attention backend with our writes and reads of its cache; imported by vLLM alone. See vllm.py."""

from __future__ import annotations

import torch
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.kv_cache_interface import CrossAttentionSpec, EncoderOnlyAttentionSpec

from ttskernels.integrations.vllm import attend, plan_of, start_threads, write
from ttskernels.kv.plan_layout import HeadShape


class TreeBuilder(cpu_attn.CPUAttentionMetadataBuilder):
    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        made = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if not isinstance(self.kv_cache_spec, CrossAttentionSpec | EncoderOnlyAttentionSpec) and made.causal is True:
            heads = HeadShape(self.num_heads, self.num_kv_heads, self.head_dim, self.head_dim, self.dtype.itemsize)
            start_threads()
            made.plan = plan_of(made.block_table, made.seq_lens, made.query_start_loc, self.block_size, heads)
        return made


class TreeImpl(cpu_attn.CPUAttentionBackendImpl):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        fits = self.head_size % 16 == 0 and self.head_size <= 256
        self.served = (
            self.attn_type == AttentionType.DECODER and self.alibi_slopes is None and not self.is_fp8_kv_cache and fits
        )

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *scales, **named_scales):
        if not self.served or attn_metadata is None:
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales, **named_scales)
        if not hasattr(attn_metadata, "plan"):
            raise NotImplementedError("ttskernels serves causal attention only; run this model without TTSK_VLLM=1")
        window = max(0, self.sliding_window)
        attend(query, kv_cache, attn_metadata.plan, output, self.scale, window, float(self.logits_soft_cap), self.sinks)
        return output

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping: torch.Tensor) -> None:
        if self.served:
            write(key, value, kv_cache, slot_mapping)
        else:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)


class TreeBackend(cpu_attn.CPUAttentionBackend):
    @staticmethod
    def get_impl_cls():
        return TreeImpl

    @staticmethod
    def get_builder_cls():
        return TreeBuilder
