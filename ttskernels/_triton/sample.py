"""Seeded sampling on a GPU: one program a row, no sort and nothing asked of the host.

The kept tokens are a prefix of the order (logit descending, id ascending), so a filter is a logit and how many of its
equals stay. That logit is found three bits at a time: each pass over the row counts and weighs eight thresholds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def load_row(row, at, vocab):
    """Logits and their integers of the same order; -0 is 0, past the end is the smallest."""
    x = tl.load(row + at, mask=at < vocab, other=float("-inf"))
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    return x, bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def find_cut(row, vocab, top, inverse, least_count, least_mass, BLOCK: tl.constexpr):
    """The largest key with at least so many tokens, or so much mass, at it and above; and both above it alone."""
    j = tl.arange(0, 8)
    prefix = tl.zeros([], tl.int64)
    count_above, mass_above = tl.zeros([], tl.int64), tl.zeros([], tl.float64)
    for level in range(11):
        shift = 30 - 3 * level
        thresholds = prefix + (j.to(tl.int64) << shift)
        inside = thresholds < 4294967296  # the first level has two bits
        signed = (tl.where(inside, thresholds, 4294967295) - 2147483648).to(tl.int32)
        count, mass = tl.zeros([8], tl.int64), tl.zeros([8], tl.float64)
        for first in range(0, vocab, BLOCK):
            at = first + tl.arange(0, BLOCK)
            x, key = load_row(row, at, vocab)
            w = tl.exp((x - top) * inverse)
            reach = (key[:, None] >= signed[None, :]) & (at < vocab)[:, None]
            count += tl.sum(reach.to(tl.int32), 0)
            mass += tl.sum(tl.where(reach, w[:, None], 0.0), 0)
        enough = ((count >= least_count) | (mass >= least_mass)) & inside
        best = tl.max(tl.where(enough, j, 0))
        prefix += best.to(tl.int64) << shift
        beyond = (j == best + 1) & inside
        if tl.max(beyond.to(tl.int32)) > 0:
            count_above = tl.sum(tl.where(beyond, count, 0))
            mass_above = tl.sum(tl.where(beyond, mass, 0.0))
    return (prefix - 2147483648).to(tl.int32), count_above, mass_above


@triton.jit
def weight_of_key(key, top, inverse):
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return tl.exp((bits.to(tl.float32, bitcast=True) - top) * inverse)


@triton.jit
def sample_kernel(
    logits, rows, keys, positions, params,  # inputs
    tokens, logprobs,                       # outputs; a row that is not finite gives -1 and NaN
    vocab, logits_row, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    row = logits + tl.load(rows + i).to(tl.int64) * logits_row
    temperature, top_k = tl.load(params + i * 4), tl.load(params + i * 4 + 1)
    top_p, min_p = tl.load(params + i * 4 + 2), tl.load(params + i * 4 + 3)
    lanes = tl.arange(0, BLOCK)

    top, finite = tl.full([], float("-inf"), tl.float32), tl.full([], 1, tl.int32)
    for first in range(0, vocab, BLOCK):
        x = tl.load(row + first + lanes, mask=first + lanes < vocab, other=0.0)
        finite = tl.minimum(finite, tl.min((tl.abs(x) < float("inf")).to(tl.int32)))
        top = tl.maximum(top, tl.max(tl.where(first + lanes < vocab, x, float("-inf"))))
    if finite == 0:
        tl.store(tokens + i, -1)
        tl.store(logprobs + i, float("nan"))
    else:
        top = tl.where(top == 0.0, 0.0, top)
        inverse = tl.where(temperature == 0.0, 1.0, tl.minimum(1.0 / tl.maximum(temperature, 1e-45), 3.4028235e38))
        total, best = tl.zeros([], tl.float64), tl.full([], 2147483647, tl.int32)
        for first in range(0, vocab, BLOCK):
            at = first + lanes
            x, _ = load_row(row, at, vocab)
            total += tl.sum(tl.where(at < vocab, tl.exp((x - top) * inverse), 0.0)).to(tl.float64)
            best = tl.minimum(best, tl.min(tl.where((x == top) & (at < vocab), at, 2147483647)))
        token = best
        if temperature > 0.0:
            cut, ties = tl.full([], -2147483648, tl.int32), tl.full([], 2147483647, tl.int64)
            mass = total
            if (top_k >= 1.0) & (top_k < vocab):
                k = top_k.to(tl.int64)
                cut, above, above_mass = find_cut(row, vocab, top, inverse, k, float("inf"), BLOCK)
                ties = k - above
                mass = above_mass + ties.to(tl.float64) * weight_of_key(cut, top, inverse)
            if top_p < 1.0:
                budget = top_p.to(tl.float64) * mass
                key, above, above_mass = find_cut(row, vocab, top, inverse, 4294967296, budget, BLOCK)
                w = weight_of_key(key, top, inverse).to(tl.float64)
                room = tl.ceil(tl.minimum((budget - above_mass) / tl.maximum(w, 1e-300), 2147483647.0)).to(tl.int64)
                ties = tl.where(key == cut, tl.minimum(ties, room), room)
                cut = key
            # Twice over the kept tokens in id order: their mass, then the one that u falls on.
            word, _, _, _ = tl.philox(tl.load(keys + i), tl.load(positions + i), 0, 0, 0)
            u = (word >> 8).to(tl.float64) * 5.9604644775390625e-08 + 2.98023223876953125e-08
            kept = tl.zeros([], tl.float64)
            target = tl.full([], float("inf"), tl.float64)
            token = tl.full([], -1, tl.int32)
            last = tl.full([], -1, tl.int32)
            for walk in range(2):
                before, seen = tl.zeros([], tl.float64), tl.zeros([], tl.int64)
                for first in range(0, vocab, BLOCK):
                    at = first + lanes
                    x, key = load_row(row, at, vocab)
                    w = tl.exp((x - top) * inverse)
                    tie = (key == cut) & (at < vocab)
                    rank = seen + tl.cumsum(tie.to(tl.int32), 0)
                    keep = (at < vocab) & (w >= min_p) & ((key > cut) | (tie & (rank <= ties)))
                    w = tl.where(keep, w, 0.0)
                    seen += tl.sum(tie.to(tl.int32))
                    size = tl.sum(w).to(tl.float64)
                    last = tl.maximum(last, tl.max(tl.where(w > 0.0, at, -1)))
                    if (token < 0) & (before + size > target):
                        beyond = (before + tl.cumsum(w, 0).to(tl.float64) > target) & (w > 0.0)
                        found = tl.min(tl.where(beyond, at, 2147483647))
                        token = tl.where(found < 2147483647, found, tl.max(tl.where(w > 0.0, at, -1)))
                    before += size
                if walk == 0:
                    kept = before
                    target = u * kept
            token = tl.where(token < 0, last, token)  # rounding left u just beyond the last weight
        chosen = tl.load(row + token)
        tl.store(tokens + i, token)
        tl.store(logprobs + i, ((chosen - top) * inverse).to(tl.float64) - tl.log(total))


def sample(logits: Tensor, rows: Tensor, keys: Tensor, positions: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    count, vocab = rows.shape[0], logits.shape[1]
    tokens = torch.empty(count, dtype=torch.int32, device=logits.device)
    logprobs = torch.empty(count, dtype=torch.float32, device=logits.device)
    if count:
        block = min(1024, max(16, triton.next_power_of_2(vocab)))
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        args = (rows.contiguous(), keys.contiguous(), positions.contiguous(), params.contiguous())
        sample_kernel[(count,)](logits, *args, tokens, logprobs, vocab, logits.stride(0), block, num_warps=8)
    return tokens, logprobs
