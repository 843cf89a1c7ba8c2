"""Float8 as hardware has it: in Triton's interpreter, and as K and V of transformers' models.

The interpreter's own conversion loses the carry of a mantissa that is rounded up (1.97 becomes 1, not 2) and knows no NaN. Here
it rounds to nearest even, and what is too large becomes NaN, as where a conversion does not saturate: who writes has to clamp.
"""

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

DTYPES = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
WIDE = {tl.float16: torch.float16, tl.float32: torch.float32}
NAME = "sdpa_float8"


def exact_float8(monkeypatch) -> None:
    """Replaces the interpreter's conversions between float8 and wider floats."""
    from triton.runtime import interpreter

    own = interpreter._convert_float

    def convert(data, source, target, rounding):
        if source in WIDE and target in DTYPES:
            wide, narrow = torch.from_numpy(np.ascontiguousarray(data)).float(), DTYPES[target]
            fits = wide.abs() <= torch.finfo(narrow).max
            return wide.where(fits, torch.nan).to(narrow).view(torch.uint8).numpy()
        if source in DTYPES and target in WIDE:
            bits = torch.from_numpy(np.ascontiguousarray(data)).view(DTYPES[source])
            return bits.to(WIDE[target]).numpy().view(np.dtype(f"uint{target.primitive_bitwidth}"))
        return own(data, source, target, rounding)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def rounded(x: Tensor) -> Tensor:
    """The values that pages of float8_e4m3fn keep."""
    most = torch.finfo(torch.float8_e4m3fn).max
    return x.float().clamp(-most, most).to(torch.float8_e4m3fn).to(x.dtype)


def with_rounded_kv(hf):
    """A transformers model that attends to K, turned, and V as pages of float8 keep them."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(module, query, key, value, attention_mask, **options):
        return sdpa_attention_forward(module, query, rounded(key), rounded(value), attention_mask, **options)

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    hf.set_attn_implementation(NAME)
    return hf
