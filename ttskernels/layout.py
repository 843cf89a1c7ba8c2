"""The packed KV layout: sixteen-token pages with the tokens of one page in the lanes of one vector.

K `[pages, kv_heads, head_dim / f, 16, f]`, V `[pages, kv_heads, 16 / f, v_dim, f]`; f = 2 for bf16, else 1.

In fixed point (int16, int8) a page is one run a kv head, `[pages, kv_heads, 16 * dim + room for 16 float32]`: integers laid
out as with f = 2, then a scale for each slot, the largest magnitude of its vector over `MOST`.
"""

import torch
from torch import Tensor

PAGE_SIZE = 16
FIXED = {"int16": torch.int16, "int8": torch.int8}
FLOAT8 = {"fp8": torch.float8_e4m3fn}  # in token-major pages only
FORMS = ("float", *FIXED, *FLOAT8)
MOST = {torch.int16: 4095, torch.int8: 127}  # largest integers
LEAST_SCALED = 1e-30  # vectors of smaller values are zero


def pack_factor(dtype: torch.dtype) -> int:
    """Elements of the reduced dimension that lie side by side."""
    return 2 if dtype == torch.bfloat16 else 1


def new_pages(
    num_pages: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    v_dim: int | None = None,
    *,
    layers: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Uninitialised packed pages `(k, v)`; with `layers`, a leading dimension of that size."""
    f, lead = pack_factor(dtype), () if layers is None else (layers,)
    k = torch.empty(*lead, num_pages, kv_heads, head_dim // f, PAGE_SIZE, f, dtype=dtype)
    v = torch.empty(*lead, num_pages, kv_heads, PAGE_SIZE // f, v_dim or head_dim, f, dtype=dtype)
    return k, v


def to_nhd(k_pages: Tensor, v_pages: Tensor) -> tuple[Tensor, Tensor]:
    """Copy packed pages to token-major `[pages, 16, kv_heads, head_dim]` and `[..., v_dim]`."""
    k = k_pages.permute(0, 3, 1, 2, 4).flatten(3)
    v = v_pages.permute(0, 2, 4, 1, 3).flatten(1, 2)
    return tuple(t.clone(memory_format=torch.contiguous_format) for t in (k, v))  # with f = 1 those are views


def from_nhd(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Copy token-major `[pages, 16, kv_heads, dim]` tensors to packed pages: the inverse of `to_nhd`."""
    f = pack_factor(k.dtype)
    k_pages = k.unflatten(3, (-1, f)).permute(0, 2, 3, 1, 4)
    v_pages = v.unflatten(1, (-1, f)).permute(0, 3, 1, 4, 2)
    return tuple(t.clone(memory_format=torch.contiguous_format) for t in (k_pages, v_pages))


def is_fixed(pages: Tensor) -> bool:
    return pages.dtype in MOST


def fixed_run(dim: int, dtype: torch.dtype) -> int:
    """Integers of one page and kv head, the room of its scales included."""
    return PAGE_SIZE * dim + PAGE_SIZE * 4 // dtype.itemsize


def dim_of(pages: Tensor) -> int:
    """Of K pages their head_dim, of V pages their v_dim; any layout but packed floats' K."""
    return (pages.shape[2] - fixed_run(0, pages.dtype)) // PAGE_SIZE if is_fixed(pages) else pages.shape[3]


def fix(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Integers of vectors `[..., dim]`, and their scales `[...]` float32: NaN, with integers 0, where one is not finite."""
    top, finite = x.abs().amax(-1), x.isfinite().all(-1)
    most = torch.full_like(top, MOST[dtype])  # a scalar's quotient would be rounded twice
    scaled = finite & (top >= LEAST_SCALED)
    values = torch.where(scaled[..., None], x * torch.where(scaled, most / top, 0.0)[..., None], 0.0).round()
    scales = torch.where(scaled, top / most, torch.where(finite, 0.0, torch.nan))
    return values.to(dtype), scales.float()


def fixed_parts(pages: Tensor, *, keys: bool) -> tuple[Tensor, Tensor]:
    """Views of fixed-point pages: integers K `[pages, 16, heads, dim / 2, 2]` or V `[pages, 8, 2, heads, dim]`, and scales
    `[pages, 16, heads]`."""
    dim = dim_of(pages)
    values, scales = pages[..., : PAGE_SIZE * dim], pages[..., PAGE_SIZE * dim :].view(torch.float32).transpose(1, 2)
    if keys:
        return values.unflatten(2, (dim // 2, PAGE_SIZE, 2)).permute(0, 3, 1, 2, 4), scales
    return values.unflatten(2, (PAGE_SIZE // 2, dim, 2)).permute(0, 2, 4, 1, 3), scales


def put_fixed(pages: Tensor, page: Tensor, slot: Tensor, x: Tensor, *, keys: bool) -> None:
    """Write vectors `x` `[n, heads, dim]` to their slots."""
    ints, scale = fix(x, pages.dtype)
    values, scales = fixed_parts(pages, keys=keys)
    if keys:
        values[page, slot] = ints.unflatten(2, (-1, 2))
    else:
        values[page, slot // 2, slot % 2] = ints
    scales[page, slot] = scale


def from_nhd_fixed(k: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Token-major float tensors `[pages, 16, kv_heads, dim]` as fixed-point pages."""
    made = []
    for x, keys in ((k, True), (v, False)):
        pages = torch.zeros(x.shape[0], x.shape[2], fixed_run(x.shape[3], dtype), dtype=dtype)
        page, slot = (i.flatten() for i in torch.meshgrid(torch.arange(x.shape[0]), torch.arange(PAGE_SIZE), indexing="ij"))
        put_fixed(pages, page, slot, x.flatten(0, 1), keys=keys)
        made.append(pages)
    return tuple(made)


def to_nhd_fixed(k_pages: Tensor, v_pages: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The values of fixed-point pages, token-major `[pages, 16, kv_heads, dim]` in a float dtype."""
    k, k_scale = fixed_parts(k_pages, keys=True)
    v, v_scale = fixed_parts(v_pages, keys=False)
    return k.flatten(3).to(dtype) * k_scale[..., None].to(dtype), v.flatten(1, 2).to(dtype) * v_scale[..., None].to(dtype)
