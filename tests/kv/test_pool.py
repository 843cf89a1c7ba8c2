import random

import pytest
import torch

from ttskernels.errors import OutOfPagesError
from ttskernels.kv import ByteBudget, PagePool


@pytest.mark.parametrize(
    "dtype, k_shape, v_shape",
    [
        (torch.bfloat16, (2, 5, 3, 32, 16, 2), (2, 5, 3, 8, 48, 2)),
        (torch.float16, (2, 5, 3, 64, 16, 1), (2, 5, 3, 16, 48, 1)),
    ],
)
def test_layout(dtype, k_shape, v_shape):
    pool = PagePool(2, 3, 64, 5, dtype, v_dim=48)
    assert pool.k.shape == k_shape and pool.v.shape == v_shape
    assert pool.page_bytes * 5 == pool.k.nbytes + pool.v.nbytes


@pytest.mark.parametrize("form, element", [("int16", torch.int16), ("int8", torch.int8)])
def test_fixed_point_layout(form, element):
    pool = PagePool(2, 3, 64, 5, torch.bfloat16, v_dim=48, form=form)
    size = element.itemsize
    assert pool.k.shape == (2, 5, 3, 16 * 64 + 64 // size) and pool.v.shape == (2, 5, 3, 16 * 48 + 64 // size)
    assert pool.k.dtype == pool.v.dtype == element and (pool.dtype, pool.form) == (torch.bfloat16, form)
    assert pool.page_bytes == 2 * 3 * 16 * ((64 + 48) * size + 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_float8_layout(dtype):
    """Token-major, one byte an element, odd heads too."""
    pool = PagePool(2, 3, 5, 7, dtype, v_dim=48, strided=True, form="fp8")
    assert pool.k.shape == (2, 7, 16, 3, 5) and pool.v.shape == (2, 7, 16, 3, 48)
    assert pool.k.dtype == pool.v.dtype == torch.float8_e4m3fn and (pool.dtype, pool.form) == (dtype, "fp8")
    assert pool.page_bytes == 2 * 3 * 16 * (5 + 48)


def test_forms_that_do_not_exist():
    for options, message in [
        ({"form": "int4"}, "form must be one of .*got 'int4'"),
        ({"form": "int8", "strided": True}, "'float' or 'fp8' for strided pages or on a GPU, got 'int8'"),
        ({"form": "fp8"}, "form must be 'float', 'int16' or 'int8' for packed pages, got 'fp8'; pass strided=True"),
    ]:
        with pytest.raises(ValueError, match=message):
            PagePool(1, 1, 64, 4, torch.bfloat16, **options)
    with pytest.raises(ValueError, match="head_dim must be even for int16 pages, got 5"):
        PagePool(1, 1, 5, 4, torch.float32, form="int16")


def test_take_and_give():
    budget = ByteBudget(10**9)
    pool = PagePool(1, 1, 4, 8, torch.float32, budget)
    first = pool.take(3)
    assert first == [0, 1, 2] and pool.num_free == 5
    pool.give([1])
    assert sorted(pool.take(3)) == [1, 3, 4]  # a used page first
    assert pool.peak_pages == 5 and budget.used_bytes == 5 * pool.page_bytes
    with pytest.raises(
        OutOfPagesError, match=r"take\(4\) needs 4 pages, 3 of 8 are free; release nodes or raise"
    ):
        pool.take(4)
    pool.give(range(5))
    assert pool.num_free == 8 and budget.used_bytes == 0 and pool.peak_bytes == 5 * pool.page_bytes
    assert pool.take(0) == [] and sorted(pool.take(8)) == list(range(8))


def test_pool_invalid():
    pool = PagePool(1, 1, 4, 8, torch.float32)
    pages = pool.take(3)
    for bad in ([0, 1, 0], [7], [-1], [8]):
        with pytest.raises(ValueError, match=f"page {bad[-1]} is not in use"):
            pool.give(bad)
        assert pool.used_pages == 3 and all(pool.is_used(p) for p in pages)
    with pytest.raises(ValueError, match="n >= 0, got -1"):
        pool.take(-1)
    with pytest.raises(ValueError, match="head_dim must be even"):
        PagePool(1, 1, 5, 8, torch.bfloat16)
    with pytest.raises(ValueError, match="must be positive"):
        PagePool(1, 0, 4, 8, torch.float32)
    with pytest.raises(ValueError, match="dtype must be float32"):
        PagePool(1, 1, 4, 8, torch.float64)
    with pytest.raises(ValueError, match="total_bytes must be positive, got 0"):
        ByteBudget(0)


def test_pages_of_a_strided_pool_follow_each_other():
    pool = PagePool(1, 1, 64, 24, torch.float32, strided=True)
    first, second = pool.take(4), pool.take(4)
    assert (first, second) == ([0, 1, 2, 3], [4, 5, 6, 7])
    assert pool.take(3, after=7) == [8, 9, 10]  # goes on
    assert pool.take(2, after=3) == [11, 12]  # page 4 is taken: a new run
    pool.give([5, 6, 8])
    assert pool.take(3) == [13, 14, 15]  # not the holes
    assert pool.take(8) == list(range(16, 24))
    assert pool.num_free == 3 and sorted(pool.take(3)) == [5, 6, 8]  # what is left, in pieces
    with pytest.raises(OutOfPagesError, match=r"take\(1\) needs 1 pages, 0 of 24 are free"):
        pool.take(1)


def test_any_order_of_taking_and_giving_in_runs():
    rng, pool = random.Random(0), PagePool(1, 1, 64, 50, torch.float32, strided=True)
    held: list[int] = []
    for _ in range(2000):
        if held and rng.random() < 0.5:
            given = rng.sample(held, rng.randint(1, len(held)))
            pool.give(given)
            held = [page for page in held if page not in given]
        else:
            n = rng.randint(0, pool.num_free)
            taken = pool.take(n, after=rng.choice([None, *held]))
            assert len(taken) == n and not set(taken) & set(held) and len(set(taken)) == n
            held += taken
        assert pool.used_pages == len(held) and all(pool.is_used(page) == (page in held) for page in range(50))
