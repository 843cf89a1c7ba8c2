"""Reference of page_copy: one slice at a time."""

from torch import Tensor


def page_copy(k_pool: Tensor, v_pool: Tensor, pairs: Tensor) -> None:
    for source, target, tokens in pairs.tolist():
        for pool in (k_pool, v_pool):
            pool[:, target, :tokens] = pool[:, source, :tokens]
