"""Reference of sample: float64 probabilities, a stable sort, NumPy's uint64 arithmetic for Philox."""

import numpy as np
import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)


def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """philox4x32-10: counter `[..., 4]`, key `[..., 2]`, 32-bit words in uint64 arrays -> `[..., 4]`."""
    c = [counter[..., i].astype(np.uint64) for i in range(4)]
    k = [key[..., i].astype(np.uint64) for i in range(2)]
    for _ in range(10):
        a, b = np.uint64(_MULTIPLIERS[0]) * c[0], np.uint64(_MULTIPLIERS[1]) * c[2]
        c = [(b >> np.uint64(32)) ^ c[1] ^ k[0], b & _LOW, (a >> np.uint64(32)) ^ c[3] ^ k[1], a & _LOW]
        k = [(k[i] + np.uint64(_WEYL[i])) & _LOW for i in range(2)]
    return np.stack(c, -1)


def uniform(keys: Tensor, positions: Tensor) -> Tensor:
    """The float64 number in (0, 1) that a path key draws at a token position."""
    key = keys.cpu().numpy().astype(np.int64).view(np.uint64)
    counter = np.zeros((len(key), 4), np.uint64)
    counter[:, 0] = positions.cpu().numpy().astype(np.int32).view(np.uint32)
    word = philox4x32(counter, np.stack([key & _LOW, key >> np.uint64(32)], -1))[:, 0]
    return torch.from_numpy((word >> np.uint64(8)).astype(np.float64) * 2.0**-24 + 2.0**-25)


def kept_probabilities(logits: Tensor, params: Tensor) -> Tensor:
    """`[S, vocab]` float64: the distribution drawn from, zero at every filtered token; temperature above 0."""
    temperature, top_k, top_p, min_p = params.double().unbind(-1)
    order = torch.sort(logits.double(), dim=-1, descending=True, stable=True).indices
    p = torch.softmax(logits.double() / temperature[:, None], -1).gather(-1, order)
    rank = torch.arange(p.shape[-1], device=p.device)
    k = torch.where(top_k >= 1, top_k, p.shape[-1])
    p = p.masked_fill(rank >= k[:, None], 0)
    before = p.cumsum(-1) - p
    mass = torch.where(top_p < 1, top_p * p.sum(-1), torch.inf)
    p = p.masked_fill((before >= mass[:, None]) & (rank > 0), 0)
    p = p.masked_fill((p < min_p[:, None] * p[:, :1]) & (rank > 0), 0)
    return torch.zeros_like(p).scatter(-1, order, p / p.sum(-1, keepdim=True))


def sample(logits: Tensor, rows: Tensor, keys: Tensor, positions: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    picked = logits[rows.long()]
    finite = picked.isfinite().all(-1)
    picked = torch.where(finite[:, None], picked, 0)
    greedy = params[:, 0] == 0
    params = params.clone()
    params[greedy, 0] = 1.0
    cdf = kept_probabilities(picked, params).cumsum(-1)
    target = uniform(keys, positions).to(cdf.device) * cdf[:, -1]
    tokens = torch.searchsorted(cdf, target[:, None], right=True)[:, 0]
    largest = (picked == picked.max(-1, keepdim=True).values).long().argmax(-1)  # argmax of equal values: the first
    tokens = torch.where(greedy, largest, tokens)
    logprobs = torch.log_softmax(picked.double() / params[:, :1].double(), -1).gather(-1, tokens[:, None])[:, 0]
    return torch.where(finite, tokens, -1).int(), torch.where(finite, logprobs, torch.nan).float()
