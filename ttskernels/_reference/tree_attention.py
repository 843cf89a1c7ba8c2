"""Reference of tree_attention: dense attention of each row over its own path, read from the plan's items."""

import numpy as np
import torch
from torch import Tensor

from ttskernels import layout

# Fields of the header and sizes of the records in csrc/include/ttskernels/plan.h.
NUM_ROWS, NUM_ITEMS, ROW_POS, ROW_PERM, ITEMS, SEGS = 4, 5, 14, 16, 18, 19
ITEM_INTS, SEG_INTS = 8, 4


def row_paths(plan: Tensor) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of every caller row: page, slot and position of each token its items hold, by position, unclipped."""
    p = plan.cpu().numpy()
    perm = p[p[ROW_PERM] :]
    parts: list[list[tuple[int, int, int]]] = [[] for _ in range(p[NUM_ROWS])]
    for i in range(p[NUM_ITEMS]):
        row_lo, row_n, seg_lo, seg_n, pos = p[p[ITEMS] + i * ITEM_INTS :][:5]
        tokens = []
        for page, offset, count, _ in p[p[SEGS] + seg_lo * SEG_INTS :][: seg_n * SEG_INTS].reshape(
            -1, SEG_INTS
        ):
            tokens += [(page, offset + j, pos + j) for j in range(count)]
            pos += count
        for row in perm[row_lo : row_lo + row_n]:
            parts[row] += tokens
    paths = []
    for tokens in parts:
        table = np.array(sorted(tokens, key=lambda t: t[2]), dtype=np.int64).reshape(-1, 3)
        paths.append((table[:, 0], table[:, 1], table[:, 2]))
    return paths


def visible_kv(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: Tensor, window: int
) -> list[tuple[Tensor, Tensor]]:
    """Of every row: K `[tokens, kv_heads, head_dim]` and V of the tokens it sees."""
    p = plan.cpu().numpy()
    paths = row_paths(plan)
    used = np.unique(np.concatenate([page for page, _, _ in paths])) if paths else np.zeros(0, dtype=np.int64)
    at = torch.from_numpy(used).to(k_pages.device)  # the pool may be huge
    k, v = _pick(k_pages, at), _pick(v_pages, at)
    if layout.is_fixed(k_pages):
        k, v = layout.to_nhd_fixed(k, v, torch.float64 if q.dtype == torch.float64 else torch.float32)
    elif k_pages.ndim == 5:
        k, v = layout.to_nhd(k, v)
    result = []
    for row, (page, slot, position) in enumerate(paths):
        last = p[p[ROW_POS] + row]
        seen = (position <= last) & (position > last - window if window > 0 else True)
        at = tuple(torch.from_numpy(i).to(k.device) for i in (np.searchsorted(used, page[seen]), slot[seen]))
        result.append((_pick(k, at), _pick(v, at)))
    return result


def _pick(pages: Tensor, at) -> Tensor:
    """`pages[at]`, also of float8, which torch does not index."""
    if pages.element_size() > 1:
        return pages[at]
    return pages.view(torch.uint8)[at].view(pages.dtype)


def tree_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: Tensor,
    scale: float,
    softcap: float,
    window: int,
    sinks: Tensor | None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_zeros(*q.shape[:2], layout.dim_of(v_pages))
    lse = q.new_full(q.shape[:2], float("-inf"), dtype=wide)
    for row, (k, v) in enumerate(visible_kv(q, k_pages, v_pages, plan, window)):
        if len(k) == 0:
            continue
        group = q.shape[1] // k.shape[1]
        if k_scale is not None:
            k = k.to(wide) * k_scale.to(wide)[:, None]
        if v_scale is not None:
            v = v.to(wide) * v_scale.to(wide)[:, None]
        k, v = (t.to(wide).repeat_interleave(group, dim=1) for t in (k, v))  # [tokens, q_heads, dim]
        scores = torch.einsum("hd,thd->ht", q[row].to(wide), k) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(wide)[:, None]], dim=1)
        lse[row] = torch.logsumexp(scores, dim=1)
        weights = torch.exp(scores - lse[row, :, None])[:, : len(k)]
        out[row] = torch.einsum("ht,thd->hd", weights, v).to(q.dtype)
    return out, lse
