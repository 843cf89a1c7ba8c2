"""Linear layer over weights that are packed once."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ttskernels._dispatch import Impl, resolve
from ttskernels._reference import linear as reference

Form = Literal["float", "int16", "int8"]
FORMS = get_args(Form)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class PackedLinear:
    """Weights laid out for one implementation; made by `linear_pack`, used by `linear`. `data` is opaque."""

    data: Tensor
    out_features: int
    in_features: int
    dtype: torch.dtype
    impl: str
    form: Form = "float"


def linear_pack(weight: Tensor, *, form: Form = "float", impl: Impl = "auto") -> PackedLinear:
    """Lay out a weight for `linear`: panels of 64 outputs, bf16 in pairs along the inputs. On a GPU ("triton") the
    weight stays as it is and the vendor's GEMM runs.

    Args:
        weight: `[out_features, in_features]`, fp32 / fp16 / bf16; copied, not kept (kept by "reference" and
            "triton").
        form: "float" keeps the weight's dtype. "int16" and "int8" are fixed point: 64 consecutive weights of a row
            share a scale (their largest magnitude is 4095 or 127), and so do 64 inputs of `x` (8191 or 32767); sums of
            64 products are exact. The rounding of "int16" is finer than that of bf16 inputs, and twice as fast as float
            multiply-adds where the CPU has VNNI; "int8" also halves the bytes. Not on a GPU.
    Raises:
        ValueError: shape or dtype mismatch.
    """
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"weight must be [out_features, in_features], both at least 1, got {tuple(weight.shape)}")
    chosen = resolve(impl, weight)
    if form not in FORMS or form != "float" and chosen == "triton":
        raise ValueError(f"form must be one of {FORMS} on a CPU and 'float' on a GPU, got {form!r}")
    if chosen != "reference" and weight.dtype not in DTYPES:
        raise ValueError(f"weight must be float32, float16 or bfloat16, got {weight.dtype}; pass impl='reference'")
    data = torch.ops.ttskernels.linear_pack(weight.contiguous(), FORMS.index(form)) if chosen == "cpu" else weight
    return PackedLinear(data, weight.shape[0], weight.shape[1], weight.dtype, chosen, form)


def linear(x: Tensor, packed: PackedLinear, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, float32 inside, rounded once at the end.

    Args:
        x: `[rows, in_features]`, dtype of the packed weight; not modified.
        packed: from `linear_pack`; its implementation runs.
        bias: `[out_features]`, any floating dtype.
    Returns:
        `[rows, out_features]`, dtype of `x`. On the CPU a row's bits do not depend on the other rows.
    Raises:
        ValueError: shape, dtype or device mismatch.
    """
    if x.ndim != 2 or x.shape[1] != packed.in_features:
        raise ValueError(f"x must be [rows, {packed.in_features}] for this packed weight, got {tuple(x.shape)}")
    if x.dtype != packed.dtype:
        raise ValueError(f"x must have the packed weight's dtype {packed.dtype}, got {x.dtype}; pass x.to(...)")
    if x.device != packed.data.device:
        raise ValueError(f"x must be on the packed weight's device {packed.data.device}, got {x.device}")
    if bias is not None and bias.shape != (packed.out_features,):
        raise ValueError(f"bias must be [{packed.out_features}] for this packed weight, got {tuple(bias.shape)}")
    if packed.impl == "triton":
        return torch.nn.functional.linear(x, packed.data, None if bias is None else bias.to(x.dtype))
    if packed.impl == "reference":
        if packed.form != "float":
            return reference.linear_fixed(x, packed.data, bias, packed.form)
        return reference.linear(x, packed.data, bias)
    wide = None if bias is None else bias.to(x.device, torch.float32).contiguous()
    return torch.ops.ttskernels.linear(x.contiguous(), packed.data, packed.out_features, wide, FORMS.index(packed.form))
