"""llama.cpp by llama-cpp-python's C API: a prompt is decoded once and shared by `seq_cp`; also an incremental reward model.

What earlier calls left in memory is kept, so a prompt that continues a sampled path costs only its new tokens.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import llama_cpp as C
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from protocol import BAD, GOOD, chance, serve, shared_prefix, versions  # noqa: E402

BATCH = 2048  # tokens of one llama_decode


class LlamaCppWorker:
    def load(self, model, precision, threads, context, sequences):
        C.llama_backend_init()
        params = C.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = C.llama_model_load_from_file(str(model).encode(), params)
        vocab = C.llama_model_get_vocab(self.model)
        self.vocab = C.llama_vocab_n_tokens(vocab)
        options = C.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = context, BATCH, 512
        options.n_seq_max = min(C.llama_max_parallel_sequences(), max(2 * sequences, sequences + 1))
        options.kv_unified, options.no_perf = True, True  # unified: seq_cp shares cells instead of copying them
        options.n_threads = options.n_threads_batch = threads
        self.context = C.llama_init_from_model(self.model, options)
        self.memory = C.llama_get_memory(self.context)
        self.batch = C.llama_batch_init(BATCH, 0, 1)
        self.slots = options.n_seq_max
        self.held: dict[int, list[int]] = {}  # sequence -> its tokens that are in memory
        self.paths: list[int] = []  # sequence of each path of the last score_steps
        info = C.llama_print_system_info().decode()
        return {"versions": versions("llama-cpp-python"), "settings": {"n_ubatch": 512, "system": info}}

    # -- sequences -----------------------------------------------------------------------------------------------------

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> Iterator[np.ndarray]:
        """`rows` of (token, position, sequence, wanted): logits of the wanted ones, a batch at a time, valid until the next."""
        batch = self.batch
        for first in range(0, len(rows), BATCH):
            part = rows[first : first + BATCH]
            batch.n_tokens = len(part)
            for i, (token, position, sequence, wanted) in enumerate(part):
                batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            code = C.llama_decode(self.context, batch)
            if code:
                raise RuntimeError(f"llama_decode returned {code}; raise context")
            wanted = sum(row[3] for row in part)
            if wanted:
                at = ctypes.cast(C.llama_get_logits(self.context), ctypes.POINTER(ctypes.c_float))
                yield np.ctypeslib.as_array(at, (wanted, self.vocab))

    def _scores(self, rows: list[tuple[int, int, int, bool]]) -> list[float]:
        return [chance(float(row[GOOD]), float(row[BAD])) for logits in self._decode(rows) for row in logits]

    def _fork(self, sequence: int, count: int, length: int) -> list[int]:
        free = [i for i in range(self.slots) if i not in self.held][:count]
        if len(free) < count:
            raise RuntimeError(f"{count} sequences wanted, {len(free)} of {self.slots} free; raise sequences")
        for child in free:
            C.llama_memory_seq_cp(self.memory, sequence, child, 0, length)
            self.held[child] = self.held[sequence][:length]
        return free

    def _drop(self, sequences) -> None:
        for sequence in list(sequences):
            C.llama_memory_seq_rm(self.memory, sequence, -1, -1)
            del self.held[sequence]

    def _new(self) -> int:
        free = next(i for i in range(self.slots) if i not in self.held)
        self.held[free] = []
        return free

    def _longest(self, prompt: list[int]) -> tuple[int | None, int]:
        """The sequence that shares most with a prompt, and how much of it may be kept: the last token is decoded anew."""
        kept, sequence = max(((shared_prefix(ids, prompt), s) for s, ids in self.held.items()), default=(0, None))
        kept = min(kept, len(prompt) - 1)
        return (sequence, kept) if kept else (None, 0)

    # -- calls ---------------------------------------------------------------------------------------------------------

    def generate(self, prompts, samples, tokens, seed):
        draw = np.random.default_rng(seed)
        started = time.perf_counter()
        known, rows, roots = [self._longest(prompt) for prompt in prompts], [], []
        self._drop(set(self.held) - {sequence for sequence, _ in known})
        old = set(self.held)
        for prompt, (sequence, kept) in zip(prompts, known, strict=True):
            root = self._new() if sequence is None else self._fork(sequence, 1, kept)[0]
            rows += [(prompt[p], p, root, p == len(prompt) - 1) for p in range(kept, len(prompt))]
            self.held[root] = list(prompt)
            roots.append(root)
        self._drop(old)
        ready = np.concatenate([logits.copy() for logits in self._decode(rows)])
        prefill_seconds = time.perf_counter() - started
        leaves = [leaf for root in roots for leaf in [root, *self._fork(root, samples - 1, len(self.held[root]))]]
        ready, out = np.repeat(ready, samples, 0), [[] for _ in leaves]
        while True:
            chosen = sample(ready, draw)
            for ids, token in zip(out, chosen, strict=True):
                ids.append(token)
            if len(out[0]) == tokens:
                break
            rows = [(t, len(self.held[s]), s, True) for s, t in zip(leaves, chosen, strict=True)]
            for leaf, token in zip(leaves, chosen, strict=True):
                self.held[leaf].append(token)
            (ready,) = self._decode(rows)  # fewer rows than a batch
        return {"seconds": time.perf_counter() - started, "prefill_seconds": prefill_seconds, "ids": out}

    def score_begin(self, prompt):
        self._drop(self.held)
        self.prompt, self.paths = prompt, []

    def score_steps(self, parents, steps):
        started = time.perf_counter()
        rows, new = [], []
        if not self.paths:
            root = self._new()
            self._scores([(t, p, root, False) for p, t in enumerate(self.prompt)])
            self.held[root] = list(self.prompt)
            self.paths, parents = [root], [0] * len(steps)
        old = self.paths
        for parent, step in zip(parents, steps, strict=True):
            child = self._fork(old[parent], 1, len(self.held[old[parent]]))[0]
            new.append(child)
            start = len(self.held[child])
            rows += [(t, start + p, child, p == len(step) - 1) for p, t in enumerate(step)]
            self.held[child] += step
        self._drop(old)
        self.paths = new
        scores = self._scores(rows)
        return {"seconds": time.perf_counter() - started, "scores": scores}

    def score_whole(self, paths):
        started = time.perf_counter()
        scores = []
        for path in paths:
            self._drop(self.held)
            sequence = self._new()
            scores += self._scores([(t, p, sequence, p == len(path) - 1) for p, t in enumerate(path)])
        self._drop(self.held)
        return {"seconds": time.perf_counter() - started, "scores": scores}


def sample(logits: np.ndarray, draw) -> list[int]:
    """One token a row at temperature 1, by inversion."""
    weights = np.exp(logits - logits.max(1, keepdims=True))
    sums = np.cumsum(weights, 1, dtype=np.float32)
    at = draw.random(len(logits), np.float32) * sums[:, -1]
    return [int(min(np.searchsorted(row, x, side="right"), len(row) - 1)) for row, x in zip(sums, at, strict=True)]


if __name__ == "__main__":
    serve(LlamaCppWorker())
