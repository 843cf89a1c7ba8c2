"""Gated activation of an MLP."""

from torch import Tensor

from ttskernels._dispatch import Impl, resolve
from ttskernels._reference import silu_mul as reference


def silu_mul(gate: Tensor, up: Tensor, *, impl: Impl = "auto") -> Tensor:
    """`silu(gate) * up`, float32 inside, rounded once. On the CPU it is PyTorch's arithmetic at every `impl`.

    Args:
        gate, up: `[rows, dim]` of one floating dtype, last stride 1; rows may be strided (halves of one product).
    Returns:
        `[rows, dim]`, dtype of `gate`.
    Raises:
        ValueError: shape, dtype or device mismatch.
    Source: Shazeer 2020, arXiv:2002.05202.
    """
    if gate.ndim != 2 or gate.shape != up.shape:
        raise ValueError(f"gate and up must both be [rows, dim], got {tuple(gate.shape)} and {tuple(up.shape)}")
    if gate.dtype != up.dtype or not gate.is_floating_point():
        raise ValueError(f"gate and up must have one floating dtype, got {gate.dtype} and {up.dtype}")
    if gate.device != up.device:
        raise ValueError(f"up must be on gate's device {gate.device}, got {up.device}")
    if resolve(impl, gate) != "triton":
        return reference.silu_mul(gate, up)
    from ttskernels._triton.silu_mul import silu_mul as launch

    return launch(*(t if t.stride(1) == 1 or not t.numel() else t.contiguous() for t in (gate, up)))
