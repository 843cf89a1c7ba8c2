"""How attention runs a plan on a GPU, for whoever launches it and for whoever keeps a captured launch."""

from typing import NamedTuple


class AttentionLaunches(NamedTuple):
    """Launches for large items, for the others, and for the merge; tokens are read as boxes of rows if `straight`."""

    large: bool
    small: bool
    merge: bool
    straight: bool


def attention_launches(header: list[int]) -> AttentionLaunches:
    """Of a plan's header (csrc/include/ttskernels/plan.h). A captured launch serves plans for which they are the same.

    Raises:
        ValueError: a plan for CPUs, with items that follow each other.
    """
    if header[26]:
        raise ValueError(
            f"plan was made for a CPU ({header[26]} of its items follow others); for a GPU, build it with "
            "machine=gpu_machine(heads) of ttskernels.kv.machines, or with the model's machine"
        )
    items, slots, breaks, large_items = header[5], header[7], header[24], header[25]
    return AttentionLaunches(large_items > 0, items > large_items or not large_items, slots > 0, breaks == 0)
