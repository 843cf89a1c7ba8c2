"""KV pages: a fixed number of 16-token pages in the packed layout, and a byte budget that pools may share."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ttskernels.errors import OutOfPagesError
from ttskernels.kv.free_pages import FreeRuns, FreeStack
from ttskernels.layout import FIXED, FLOAT8, FORMS, PAGE_SIZE, fixed_run, pack_factor


class ByteBudget:
    """Bytes of KV that several pools may use together. Pools take and give; nobody else needs to."""

    __slots__ = ("total_bytes", "used_bytes", "peak_bytes")

    def __init__(self, total_bytes: int):
        if total_bytes <= 0:
            raise ValueError(f"total_bytes must be positive, got {total_bytes}")
        self.total_bytes = int(total_bytes)
        self.used_bytes = 0
        self.peak_bytes = 0

    @property
    def free_bytes(self) -> int:
        return self.total_bytes - self.used_bytes

    def change(self, num_bytes: int) -> None:
        """Take (positive) or give (negative) bytes; the pool has checked that they are free."""
        self.used_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)


class PagePool:
    """K and V of every layer in pages of 16 tokens, and the free list over them.

    Args:
        num_pages: pages of the pool; memory is committed by the system when a page is first written.
        dtype: fp32, fp16 or bf16. bf16 keeps pairs side by side (`head_dim` must be even).
        budget: shared with other pools; a page is free only if its bytes are free there too.
        v_dim: value dimension, `head_dim` if not given.
        strided: token-major pages, `[layers, pages, 16, kv_heads, dim]`, as GPU kernels read them.
        form: "float" keeps values in `dtype`. "int16" and "int8" keep them in fixed point for a model of that dtype:
            `[layers, pages, kv_heads, 16 * dim + room for 16 float32]`, integers of every token and head and then the scales.
            "fp8" keeps them as float8_e4m3fn, in strided pages.

    Otherwise `.k` is `[layers, pages, kv_heads, head_dim / f, 16, f]`, `.v` `[layers, pages, kv_heads, 16 / f, v_dim,
    f]` with f = 2 for bf16, else 1. Not thread-safe: one engine thread owns a pool.
    """

    page_size = PAGE_SIZE

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        num_pages: int,
        dtype: torch.dtype,
        budget: ByteBudget | None = None,
        *,
        v_dim: int | None = None,
        device: str | torch.device = "cpu",
        strided: bool = False,
        form: str = "float",
    ):
        pack = pack_factor(dtype)
        v_dim = head_dim if v_dim is None else v_dim
        if min(layers, kv_heads, head_dim, v_dim, num_pages) <= 0:
            raise ValueError(
                "layers, kv_heads, head_dim, v_dim and num_pages must be positive, "
                f"got {layers}, {kv_heads}, {head_dim}, {v_dim}, {num_pages}"
            )
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
        if form not in FORMS or form in FIXED and (strided or torch.device(device).type != "cpu"):
            raise ValueError(f"form must be one of {FORMS}, and 'float' or 'fp8' for strided pages or on a GPU, got {form!r}")
        if form in FLOAT8 and not strided:
            raise ValueError(f"form must be 'float', 'int16' or 'int8' for packed pages, got {form!r}; pass strided=True")
        if form in FIXED and head_dim % 2:
            raise ValueError(f"head_dim must be even for {form} pages, got {head_dim}; pad the heads or use float pages")
        if head_dim % pack and not strided:
            raise ValueError(
                f"head_dim must be even for bfloat16 pages, got {head_dim}; pad the heads or use float32"
            )
        self.layers, self.kv_heads, self.head_dim, self.v_dim = layers, kv_heads, head_dim, v_dim
        self.num_pages, self.dtype, self.form, self.budget = num_pages, dtype, form, budget
        k_shape = (layers, num_pages, kv_heads, head_dim // pack, PAGE_SIZE, pack)
        v_shape = (layers, num_pages, kv_heads, PAGE_SIZE // pack, v_dim, pack)
        if strided:
            k_shape, v_shape = ((layers, num_pages, PAGE_SIZE, kv_heads, d) for d in (head_dim, v_dim))
        kept = (FIXED | FLOAT8).get(form, dtype)
        if form in FIXED:
            k_shape, v_shape = ((layers, num_pages, kv_heads, fixed_run(d, kept)) for d in (head_dim, v_dim))
        self.k = torch.empty(k_shape, dtype=kept, device=device)
        self.v = torch.empty(v_shape, dtype=kept, device=device)
        self.page_bytes = (self.k.nbytes + self.v.nbytes) // num_pages
        self.peak_pages = 0
        self._used = bytearray(num_pages)
        self.keeps_runs = strided  # pages taken together follow each other, where there are such
        self._free = (FreeRuns if strided else FreeStack)(self._used)

    @property
    def used_pages(self) -> int:
        return self.num_pages - self._free.count

    @property
    def num_free(self) -> int:
        """Pages that `take` can hand out now, given the budget."""
        free = self._free.count
        return free if self.budget is None else min(free, self.budget.free_bytes // self.page_bytes)

    @property
    def peak_bytes(self) -> int:
        return self.peak_pages * self.page_bytes

    def is_used(self, page: int) -> bool:
        return bool(self._used[page])

    def take(self, n: int, after: int | None = None) -> list[int]:
        """`n` pages with undefined contents, or OutOfPagesError and no change. They go on behind page `after`, if the pool
        `keeps_runs` and those pages are free."""
        if n < 0:
            raise ValueError(f"take(n) needs n >= 0, got {n}")
        if n > self.num_free:
            raise OutOfPagesError(
                f"take({n}) needs {n} pages, {self.describe_free()}; release nodes or raise num_pages"
            )
        pages, used = self._free.take(n, after), self._used
        for page in pages:
            used[page] = 1
        self.peak_pages = max(self.peak_pages, self.used_pages)
        if self.budget is not None:
            self.budget.change(n * self.page_bytes)
        return pages

    def give(self, pages: Iterable[int]) -> None:
        """Return pages taken earlier. A page that is not in use raises ValueError and nothing changes."""
        pages = list(pages)
        used = self._used
        for i, page in enumerate(pages):
            if not (0 <= page < self.num_pages and used[page]):
                for back in pages[:i]:
                    used[back] = 1
                raise ValueError(
                    f"give: page {page} is not in use (given twice, or not of this pool of {self.num_pages})"
                )
            used[page] = 0
        self._free.give(pages)
        if self.budget is not None:
            self.budget.change(-len(pages) * self.page_bytes)

    def free(self) -> None:
        """Give the memory back to the system, whoever still refers to the pool; it is of no use afterwards."""
        self.k, self.v = self.k.new_empty(0), self.v.new_empty(0)

    def describe_free(self) -> str:
        """`3 of 4096 are free`, with the shared budget if that is what is short."""
        text = f"{self.num_free} of {self.num_pages} are free"
        if self.budget is not None and self.num_free < self.num_pages - self.used_pages:
            text += f" (byte budget: {self.budget.free_bytes} of {self.budget.total_bytes} bytes left)"
        return text
