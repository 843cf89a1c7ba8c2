"""Linear layers: over weights that are packed once (CPU), and, for few rows on a GPU, in parts or gated."""

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
class Rounded:
    """An int8 weight that is rounded already, see `ttskernels.models.rounding`.

    `values` are integers in -127 .. 127 of the weights, turned as `linear_pack` turns them (not scaled back), the last 64
    filled up with zeros: `[out_features, groups * size]` int8. `scales` is what one of a group's is worth: `[out_features,
    groups]` float32. `dtype` is that of the weight and of `x`.
    """

    values: Tensor
    scales: Tensor
    in_features: int
    dtype: torch.dtype

    def __post_init__(self):
        size = reference.group_size(self.in_features, "int8")
        groups = -(-self.in_features // size)
        values, scales = (len(self.values), groups * size), (len(self.values), groups)
        if (self.values.dtype, tuple(self.values.shape)) != (torch.int8, values):
            raise ValueError(f"values must be int8 {values}, got {self.values.dtype} {tuple(self.values.shape)}")
        if (self.scales.dtype, tuple(self.scales.shape)) != (torch.float32, scales):
            raise ValueError(f"scales must be float32 {scales}, got {self.scales.dtype} {tuple(self.scales.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.values), self.in_features

    @property
    def device(self) -> torch.device:
        return self.values.device


@dataclass(frozen=True)
class PackedLinear:
    """Weights laid out for one implementation; made by `linear_pack`, used by `linear`. `data` is opaque."""

    data: Tensor | Rounded
    out_features: int
    in_features: int
    dtype: torch.dtype
    impl: str
    form: Form = "float"


def linear_pack(weight: Tensor | Rounded, *, form: Form = "float", impl: Impl = "auto") -> PackedLinear:
    """Lay out a weight for `linear`: panels of 64 outputs, bf16 in pairs along the inputs. On a GPU ("triton") the
    weight stays as it is and the vendor's GEMM runs.

    Args:
        weight: `[out_features, in_features]`, fp32 / fp16 / bf16; copied, not kept (kept by "reference" and
            "triton"). Or an int8 weight that is rounded already.
        form: "float" keeps the weight's dtype. "int16" and "int8" are fixed point: a group of consecutive weights of a
            row shares a scale (their largest magnitude is 4095 or 127), and so does a group of inputs (8191 or 127); a
            group's sum is exact. "int16", in groups of 64, rounds less than bf16 inputs do, and is up to twice as fast as
            float multiply-adds. "int8" halves the bytes and, with VNNI, doubles that rate again. Its groups are 192, 128
            or 64, the first that whole 64s of a row divide into; weights and inputs are turned before they are rounded,
            each 64 by a Hadamard transform (QuaRot, arXiv:2404.00456), then the 64s of a group among each other, which
            spreads outliers; so inputs must be below 2e36. Not on a GPU.
    Raises:
        ValueError: shape or dtype mismatch.
    """
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise ValueError(f"weight must be [out_features, in_features], both at least 1, got {tuple(weight.shape)}")
    rounded = isinstance(weight, Rounded)
    if rounded and form != "int8":
        raise ValueError(f"form must be 'int8' for a weight that is rounded already, got {form!r}")
    chosen = resolve(impl, weight.values if rounded else weight)
    if form not in FORMS or form != "float" and chosen == "triton":
        raise ValueError(f"form must be one of {FORMS} on a CPU and 'float' on a GPU, got {form!r}")
    if chosen != "reference" and weight.dtype not in DTYPES:
        raise ValueError(f"weight must be float32, float16 or bfloat16, got {weight.dtype}; pass impl='reference'")
    data = weight
    if chosen == "cpu":
        source, scales = (weight.values, weight.scales.contiguous()) if rounded else (weight, None)
        data = torch.ops.ttskernels.linear_pack(source.contiguous(), FORMS.index(form), scales)
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
            data = packed.data
            known = (data.values, data.scales) if isinstance(data, Rounded) else reference.fixed_weight(data, packed.form)
            return reference.linear_fixed(x, *known, bias, packed.form)
        return reference.linear(x, packed.data, bias)
    wide = None if bias is None else bias.to(x.device, torch.float32).contiguous()
    return torch.ops.ttskernels.linear(x.contiguous(), packed.data, packed.out_features, wide, FORMS.index(packed.form))


def linear_parts(x: Tensor, weight: Tensor, *, parts: int | None = None, impl: Impl = "auto") -> Tensor:
    """`x @ weight.T` as float32 sums over shares of the inputs, which whoever reads them adds up.

    For the few rows of a decode iteration: several programs then read one output's weight. `rope_append` and `add_rms_norm`
    take the parts. On the CPU it is the reference.

    Args:
        x: `[rows, in_features]`.
        weight: `[out_features, in_features]`, dtype of `x`; not packed.
        parts: at least 1; None: as many as keep the device busy. A row's bits do not depend on the other rows.
    Returns:
        `[parts, rows, out_features]` float32 (float64 for float64); last parts may be zeros. One part where the device has no
        tensor memory accelerator, or it cannot read x or weight.
    Raises:
        ValueError: shape, dtype or device mismatch.
    """
    check_matrices(x, weight, 1)
    if parts is not None and parts < 1:
        raise ValueError(f"parts must be at least 1, got {parts}")
    if resolve(impl, x) != "triton":
        return reference.linear_parts(x, weight, parts or 1)
    from ttskernels._triton.linear import linear as launch

    return launch(x.contiguous(), weight, False, parts)


def gated_linear(x: Tensor, gate_up: Tensor, *, impl: Impl = "auto") -> Tensor:
    """`silu(x @ gate.T) * (x @ up.T)`, float32 inside, rounded once. On the CPU it is the reference.

    Args:
        x: `[rows, in_features]`.
        gate_up: `[2 * out_features, in_features]`, dtype of `x`: gate, and below it up.
    Returns:
        `[rows, out_features]`, dtype of `x`.
    Raises:
        ValueError: shape, dtype or device mismatch.
    Source: Shazeer 2020, arXiv:2002.05202.
    """
    check_matrices(x, gate_up, 2)
    if resolve(impl, x) != "triton":
        return reference.gated_linear(x, gate_up)
    from ttskernels._triton.linear import linear as launch

    return launch(x.contiguous(), gate_up, True)[0]


def check_matrices(x: Tensor, weight: Tensor, halves: int) -> None:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or not x.shape[1] or len(weight) % halves:
        wanted, got = "outputs" if halves == 1 else "2 * outputs", f"{tuple(weight.shape)} and {tuple(x.shape)}"
        raise ValueError(f"weight must be [{wanted}, inputs] for x [rows, inputs], got {got}")
    if x.dtype != weight.dtype or not x.is_floating_point() or x.device != weight.device:
        raise ValueError(
            f"weight must have x's floating dtype and device, got {weight.dtype} on {weight.device} and {x.dtype} on {x.device}"
        )
