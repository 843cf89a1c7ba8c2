"""Float8 in Triton's interpreter as hardware has it.

Its own conversion loses the carry of a mantissa that is rounded up (1.97 becomes 1, not 2) and knows no NaN. This one rounds to
nearest even, and what is too large becomes NaN, as where a conversion does not saturate: whoever writes float8 has to clamp.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

DTYPES = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
WIDE = {tl.float16: torch.float16, tl.float32: torch.float32}


def exact_float8(monkeypatch) -> None:
    """Replaces the interpreter's conversions between float8 and wider floats."""
    own = interpreter._convert_float

    def convert(data, source, target, rounding):
        if source in WIDE and target in DTYPES:
            wide, narrow = torch.from_numpy(np.ascontiguousarray(data)), DTYPES[target]
            wide = wide.float().masked_fill(wide.float().abs() > torch.finfo(narrow).max, torch.nan)
            return wide.to(narrow).view(torch.uint8).numpy()
        if source in DTYPES and target in WIDE:
            bits = torch.from_numpy(np.ascontiguousarray(data)).view(DTYPES[source])
            return bits.to(WIDE[target]).numpy().view(np.dtype(f"uint{target.primitive_bitwidth}"))
        return own(data, source, target, rounding)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
