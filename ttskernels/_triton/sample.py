"""Seeded sampling on a GPU: two launches, no sort and nothing asked of the host.

The first spreads a row over many programs: the largest logit and the mass of each chunk. The second, one program a row,
finds the chunk that the draw falls into and reads no other. The kept tokens are a prefix of the order (logit
descending, id ascending), so a filter is a logit and how many of its equals stay. Passes over the row narrow that logit
to a bracket, the few logits inside are set aside, and a bisection of those ends it. No sum depends on the batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttskernels._triton.on_device import on_device
from ttskernels._triton.tiles import all_registers

CHUNK = tl.constexpr(1024)
GROUP = tl.constexpr(4)  # chunks of a program of the first launch
TILE_ROWS, TILE_LANES = tl.constexpr(4), tl.constexpr(1024)  # of a step of a pass of the second: its lanes are threads
STAGES = tl.constexpr(3)  # steps in flight and at work
PART = tl.constexpr(128)
CANDIDATES = tl.constexpr(2048)
LEAST, LARGEST = tl.constexpr(-2147483648), tl.constexpr(2147483647)  # below and above the key of every number
LOWEST = tl.constexpr(-2139095040)  # the key of the least finite number


@triton.jit
def flip(bits):
    """Between a float's bits and its key, the integer of the same order."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    return flip(key).to(tl.float32, bitcast=True)


@triton.jit
def between(low, high, sixteenths):
    """A key that far up from low to high, whose distance may not fit an int32."""
    return (low + ((high.to(tl.int64) - low) * sixteenths >> 4)).to(tl.int32)


@triton.jit
def key_of(x):
    """-0 is 0."""
    return flip(tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True))


@triton.jit
def weight(x, top, inverse):
    return tl.exp((x - top) * inverse)


@triton.jit
def load_row(row, at, mask):
    """Logits and their keys; a masked one is -inf."""
    x = tl.load(row + at, mask=mask, other=float("-inf"))
    return x, key_of(x)


@triton.jit
def inverse_of(temperature):
    # Literals beyond float32's normal range would be float64 to Triton 3.6, and all that follows with them.
    return tl.where(temperature == 0.0, 1.0, 1.0 / tl.maximum(temperature, 1.1754944e-38))


@triton.jit
def chunk_kernel(
    logits, rows, settings,     # inputs
    tops, sums,                 # outputs [S, chunks]: the largest key (LARGEST: not finite), the mass over that logit's
    vocab, logits_row, chunks,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    at = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    x, key = load_row(logits + tl.load(rows + i).to(tl.int64) * logits_row, at, at < vocab)
    key = tl.where((tl.abs(x) < float("inf")) | (at >= vocab), key, LARGEST)
    top = tl.maximum(tl.max(key, 1), LOWEST)
    w = weight(x, value_of(top)[:, None], inverse_of(tl.load(settings + i * 4)))
    tl.store(tops + i * chunks + chunk, top, mask=chunk < chunks)
    tl.store(sums + i * chunks + chunk, tl.sum(w, 1), mask=chunk < chunks)


@triton.jit
def sums_from(row, vocab, thresholds, by_count, top, inverse):
    """The mass, or the number, of the tokens at each of eight keys and above."""
    lanes, part = tl.arange(0, TILE_LANES)[None, :], tl.arange(0, TILE_ROWS)[:, None] * TILE_LANES
    sums = tl.zeros([8, TILE_LANES], tl.float32)
    for first in tl.range(0, vocab, TILE_ROWS * TILE_LANES, num_stages=STAGES):
        at = first + part + lanes
        x, key = load_row(row, at, at < vocab)
        w = tl.where(by_count, 1.0, weight(x, top, inverse))
        sums += tl.sum(tl.where(key[None, :, :] >= thresholds[:, None, None], w[None, :, :], 0.0), 1)
    return tl.sum(sums, 1)


@triton.jit
def set_aside(row, candidates, vocab, low, high, top, inverse):
    """Keeps the keys in [low, high) in no order that matters; their number, and the number and mass of those above."""
    lanes, part = tl.arange(0, TILE_LANES), tl.arange(0, TILE_ROWS)[:, None] * TILE_LANES
    found = tl.zeros([], tl.int32)
    above, mass = tl.zeros([TILE_LANES], tl.float32), tl.zeros([TILE_LANES], tl.float32)
    for first in tl.range(0, vocab, TILE_ROWS * TILE_LANES, num_stages=STAGES):
        at = first + part + lanes[None, :]
        x, key = load_row(row, at, at < vocab)
        inside = ((key >= low) & (key < high)).to(tl.int32)
        within = tl.cumsum(inside, 0)
        in_lane = tl.max(within, 0)
        through = tl.cumsum(in_lane, 0)
        slot = found + (through - in_lane)[None, :] + within - 1
        tl.store(candidates + slot, key, mask=(inside > 0) & (slot < CANDIDATES))
        found += tl.sum(in_lane)
        above += tl.sum(tl.where(key >= high, 1.0, 0.0), 0)
        mass += tl.sum(tl.where(key >= high, weight(x, top, inverse), 0.0), 0)
    tl.debug_barrier()
    return found, tl.sum(above).to(tl.int32), tl.sum(mass).to(tl.float64)


@triton.jit
def tops_reach(best, real, top_key, k):
    """A key that at least k chunks reach, near the largest such."""
    low, high = tl.min(tl.where(real, best, LARGEST)), top_key + 1
    for _ in range(12):
        middle = between(low, high, 8)
        if tl.sum(((best >= middle) & real).to(tl.int32)) >= k:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def find_cut(row, candidates, vocab, top_key, top, inverse, by_count, need, low, low_sum):
    """The largest key with at least so many tokens, or so much mass, at it and above; number and mass above it alone.

    `low` is known to have enough, and `low_sum` to be no less than its sum; 0 guesses that few are at it and above.
    """
    j = tl.arange(0, 8)
    high = top_key + 1
    high_sum = tl.zeros([], tl.float32)
    above, mass = tl.zeros([], tl.int32), tl.zeros([], tl.float64)
    found, turn = tl.full([], -1, tl.int32), tl.zeros([], tl.int32)
    while found < 0:
        least = tl.where(by_count, 1.0, weight(value_of(low), top, inverse))
        if (high > low + 1) & (low_sum - high_sum > CANDIDATES * least):
            # Even turns part the logits evenly, odd ones the keys, which ends whatever the logits are.
            thresholds = between(low, high, 2 * j + 1)
            if (turn % 2 == 0) & (low > LOWEST):
                x, end = value_of(low), value_of(high - 1)
                x += (end - x) * ((2 * j + 1).to(tl.float32) / 16)
                thresholds = key_of(x)
            thresholds = tl.minimum(tl.maximum(thresholds, low + 1), high - 1)
            sums = sums_from(row, vocab, thresholds, by_count, top, inverse)
            enough = sums.to(tl.float64) >= need
            low = tl.max(tl.where(enough, thresholds, low))
            high = tl.min(tl.where(enough, high, thresholds))
            low_sum = tl.min(tl.where(enough, sums, low_sum))
            high_sum = tl.max(tl.where(enough, high_sum, sums))
            turn += 1
        else:
            inside, above, mass = set_aside(row, candidates, vocab, low, high, top, inverse)
            if (inside <= CANDIDATES) | (high <= low + 1):
                found = tl.minimum(inside, CANDIDATES)
            else:  # rounding hid them, or the guess was wrong
                low_sum, high_sum = tl.full([], float("inf"), tl.float32), tl.zeros([], tl.float32)
    at = tl.arange(0, CANDIDATES)
    key = tl.load(candidates + at, mask=at < found, other=LEAST)
    w = tl.where(at < found, weight(value_of(key), top, inverse), 0.0)
    outer, outer_mass = above, mass
    while high > low + 1:
        middle = between(low, high, 8)
        reach = key >= middle
        count = outer + tl.sum(reach.to(tl.int32))
        reached = outer_mass + tl.sum(tl.where(reach, w, 0.0)).to(tl.float64)
        if tl.where(by_count, count.to(tl.float64), reached) >= need:
            low = middle
        else:
            high, above, mass = middle, count, reached
    return low, above, mass


@triton.jit
def keep_parts(row, kept, equals, vocab, cut, min_p, top, inverse):
    """Of every PART tokens, a warp's own: the mass above the cut, and how many are at it."""
    lines: tl.constexpr = TILE_ROWS * TILE_LANES // PART
    for first in tl.range(0, vocab, TILE_ROWS * TILE_LANES, num_stages=STAGES):
        part = first // PART + tl.arange(0, lines)
        at = part[:, None] * PART + tl.arange(0, PART)[None, :]
        x, key = load_row(row, at, at < vocab)
        w = weight(x, top, inverse)
        mass = tl.sum(tl.where((key > cut) & (w >= min_p), w, 0.0), 1)
        tl.store(kept + part, mass, mask=part * PART < vocab)
        tl.store(equals + part, tl.sum(tl.where(key == cut, 1.0, 0.0), 1).to(tl.int32), mask=part * PART < vocab)
    tl.debug_barrier()


@triton.jit
def walk(row, chunk, vocab, cut, ties, min_p, target, top, inverse):
    """The first kept token of a chunk with more than `target` of kept mass up to it, or the last kept one."""
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    x, key = load_row(row, at, at < vocab)
    w = weight(x, top, inverse)
    tie = key == cut
    keep = ((key > cut) | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= ties))) & (w >= min_p)
    w = tl.where(keep, w, 0.0)
    beyond = (tl.cumsum(w, 0).to(tl.float64) > target) & (w > 0.0)
    token = tl.min(tl.where(beyond, at, LARGEST))
    return tl.where(token < LARGEST, token, tl.max(tl.where(w > 0.0, at, -1)))


@triton.jit
def draw_kernel(
    logits, rows, keys, positions, settings,  # inputs
    tops, sums, candidates,                   # the first launch's [S, chunks]; room [S, CANDIDATES]
    kept, equals,                             # room [S, parts]
    tokens, logprobs,                         # outputs; a row that is not finite gives -1 and NaN
    vocab, logits_row, chunks, MOST_CHUNKS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    row = logits + tl.load(rows + i).to(tl.int64) * logits_row
    tops, sums = tops + i * chunks, sums + i * chunks
    kept, equals = kept + i * chunks * (CHUNK // PART), equals + i * chunks * (CHUNK // PART)
    candidates += i * CANDIDATES
    temperature, top_k = tl.load(settings + i * 4), tl.load(settings + i * 4 + 1)
    top_p, min_p = tl.load(settings + i * 4 + 2), tl.load(settings + i * 4 + 3)
    has_top_k = (top_k >= 1.0) & (top_k < vocab)
    c = tl.arange(0, MOST_CHUNKS)
    best = tl.load(tops + c, mask=c < chunks, other=LOWEST)
    top_key = tl.max(best)
    if top_key == LARGEST:
        tl.store(tokens + i, -1)
        tl.store(logprobs + i, float("nan"))
    else:
        top, inverse = value_of(top_key), inverse_of(temperature)
        masses = tl.load(sums + c, mask=c < chunks, other=0.0).to(tl.float64)
        masses *= weight(value_of(best), top, inverse).to(tl.float64)
        total = tl.sum(masses)
        cut, ties = tl.full([], LEAST, tl.int32), tl.full([], LARGEST, tl.int32)
        ties_before = tl.zeros([MOST_CHUNKS], tl.int32)
        if temperature == 0.0:
            cut, ties = top_key, tl.full([], 1, tl.int32)
            masses = (c == tl.min(tl.where(best == top_key, c, LARGEST))).to(tl.float64)
        elif has_top_k | (top_p < 1.0) | (min_p > 0.0):
            mass, low, low_sum = total, tl.full([], LOWEST, tl.int32), tl.full([], float("inf"), tl.float32)
            if has_top_k & (top_k <= chunks):  # that many chunks hold a token at the k-th of their largest
                low, low_sum = tops_reach(best, c < chunks, top_key, top_k), tl.zeros([], tl.float32)
            elif (top_p < 1.0) & (has_top_k == 0):  # all tokens lighter than this lack the mass to be left out
                light = (1.0 - top_p.to(tl.float64)) * total / vocab * 0.5
                x = tl.maximum(top + tl.log(light).to(tl.float32) / inverse, -3.4028234e38)
                low = tl.minimum(key_of(x), top_key)
            by_count = has_top_k
            for _ in range(0, has_top_k.to(tl.int32) + (top_p < 1.0).to(tl.int32)):
                need = tl.where(by_count, top_k.to(tl.float64), top_p.to(tl.float64) * mass)
                low, above, mass = find_cut(row, candidates, vocab, top_key, top, inverse, by_count, need, low, low_sum)
                w = weight(value_of(low), top, inverse).to(tl.float64)
                room = tl.ceil(tl.minimum((need - mass) / tl.maximum(w, 1e-300), 2147483647.0)).to(tl.int32)
                room = tl.where(by_count, top_k.to(tl.int32) - above, room)
                ties = tl.where(low == cut, tl.minimum(ties, room), room)
                cut = low
                mass += ties.to(tl.float64) * w
                by_count, low_sum = tl.full([], False, tl.int1), tl.zeros([], tl.float32)  # top-k has left few
            keep_parts(row, kept, equals, vocab, cut, min_p, top, inverse)
            part = c[:, None] * (CHUNK // PART) + tl.arange(0, CHUNK // PART)[None, :]
            equal = tl.sum(tl.load(equals + part, mask=part * PART < vocab, other=0), 1)
            ties_before = tl.cumsum(equal, 0) - equal
            stay = tl.minimum(tl.maximum(ties - ties_before, 0), equal).to(tl.float64)
            w = weight(value_of(cut), top, inverse)
            w = tl.where(w >= min_p, w, 0.0)  # NaN of the least key
            masses = tl.sum(tl.load(kept + part, mask=part * PART < vocab, other=0.0).to(tl.float64), 1)
            masses += stay * w.to(tl.float64)
        word, _, _, _ = tl.philox(tl.load(keys + i), tl.load(positions + i), 0, 0, 0)
        u = (word >> 8).to(tl.float64) * 5.9604644775390625e-08 + 2.98023223876953125e-08
        target = u * tl.sum(masses)
        some = masses > 1e-24  # less than that no draw falls on, and its weights may have vanished
        chunk = tl.min(tl.where(some & (tl.cumsum(masses, 0) > target), c, LARGEST))
        chunk = tl.where(chunk < LARGEST, chunk, tl.max(tl.where(some, c, 0)))
        target -= tl.sum(tl.where(c < chunk, masses, 0.0))
        ties -= tl.sum(tl.where(c == chunk, ties_before, 0))
        token = walk(row, chunk, vocab, cut, ties, min_p, target, top, inverse)
        tl.store(tokens + i, token)
        tl.store(logprobs + i, ((tl.load(row + token) - top) * inverse).to(tl.float64) - tl.log(total))


@on_device
def sample(logits: Tensor, rows: Tensor, keys: Tensor, positions: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    count, vocab = rows.shape[0], logits.shape[1]
    tokens = torch.empty(count, dtype=torch.int32, device=logits.device)
    logprobs = torch.empty(count, dtype=torch.float32, device=logits.device)
    if count:
        chunks = triton.cdiv(vocab, CHUNK.value)
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        rows, keys, positions, params = (t.contiguous() for t in (rows, keys, positions, params))

        def room(dtype, width):
            return torch.empty(count, width, dtype=dtype, device=logits.device)

        parts = chunks * CHUNK.value // PART.value
        tops, sums = room(torch.int32, chunks), room(torch.float32, chunks)
        candidates = room(torch.int32, CANDIDATES.value)
        kept, equals = room(torch.float32, parts), room(torch.int32, parts)
        size = (vocab, logits.stride(0), chunks)
        chunk_kernel[(count, triton.cdiv(chunks, GROUP.value))](logits, rows, params, tops, sums, *size, num_warps=4)
        draw_kernel[(count,)](
            logits, rows, keys, positions, params, tops, sums, candidates, kept, equals, tokens, logprobs, *size,
            max(16, triton.next_power_of_2(chunks)), num_warps=8, **all_registers(logits.device),
        )  # fmt: skip
    return tokens, logprobs
