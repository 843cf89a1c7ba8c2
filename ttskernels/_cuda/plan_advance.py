"""Plan advance on the device: one launch, no host."""

from torch import Tensor

from ttskernels._cuda import call


def plan_advance(plan: Tensor, stuck: Tensor) -> None:
    """Moves every row of a plan's buffer one token on, or none: `stuck` `[1]` int32 becomes the rows without a slot."""
    call("ttsk_cuda_plan_advance", plan.device, plan, stuck)
