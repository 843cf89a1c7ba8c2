"""This engine: samples of one prompt, and whole searches with a process reward model of the policy's own size.

`precision` is "bf16" (as `load_model` runs it), "bf16 float" (without fixed point), "int8" or "calibrated" (weights).
Searches are the strategies of `ttsearch`, over ids.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent))
import ttsearch  # noqa: E402
from protocol import BAD, GOOD, serve, versions  # noqa: E402
from ttsearch.policies.local import LocalBackend  # noqa: E402
from ttsearch.verifiers.session import EngineVerifier  # noqa: E402
from ttsearch.verifiers.text import Extension, PrmPath  # noqa: E402

import ttskernels  # noqa: E402
from ttskernels.engine.batcher import Engine  # noqa: E402
from ttskernels.engine.work import Sampling  # noqa: E402
from ttskernels.models import load_model  # noqa: E402
from ttskernels.models.calibrated import calibration_file  # noqa: E402
from ttskernels.models.calibration import calibrate  # noqa: E402
from ttskernels.models.heads import HeadSpec  # noqa: E402
from ttskernels.models.loading import load_checkpoint  # noqa: E402

KV_BYTES = 4 << 30
OPTIONS = {
    "bf16": {}, "bf16 float": {"weights": "float", "kv": "float"},
    "int8": {"weights": "int8"}, "calibrated": {"weights": "calibrated"},
}  # fmt: skip


class IdPolicy:
    """In place of a tokenizer and its prompts: text is ids with blanks between; a step is so many tokens."""

    eos_ids = frozenset()

    def __init__(self, vocab: int, step_tokens: int):
        count = torch.arange(1, step_tokens + 1, dtype=torch.int32)
        count[-1] = -1
        self.next_state = count[:, None].repeat(1, vocab).numpy()

    def prompt_ids(self, problem: str) -> list[int]:
        return [int(word) for word in problem.split()]

    def decode(self, ids) -> str:
        return "".join(f"{token} " for token in ids)

    def finish_reason(self, state: int, last_id: int) -> str:
        return "length" if state >= 0 else "step"


class IdVerifier:
    """A reward model that reads the policy's ids as they are and scores a step at its last one."""

    family = SimpleNamespace(name="two rows of the vocabulary", read="step")
    stepwise = False

    def start(self, problem: str) -> PrmPath:
        return PrmPath(problem, (), tuple(int(word) for word in problem.split()))

    def extend(self, path: PrmPath, steps) -> Extension:
        ids, reads = [], []
        for step in steps:
            ids += [int(word) for word in step.split()]
            reads.append(len(ids) - 1)
        new = PrmPath(path.problem, (*path.steps, *steps), (*path.ids, *ids))
        return Extension(new, len(path.ids), ids, reads, list(range(len(steps))))

    def fits(self, num_ids: int) -> bool:
        return True


class OursWorker:
    def load(self, model, precision, threads, context, sequences):
        if precision not in OPTIONS:
            raise ValueError(f"precision must be one of {', '.join(OPTIONS)}, got {precision!r}")
        self.source, self.options, self.backends = model, OPTIONS[precision], {}
        if precision == "calibrated" and not calibration_file(load_checkpoint(model, torch.bfloat16)).is_file():
            calibrate(model, torch.bfloat16)
        self.policy = load_model(model, torch.bfloat16, **self.options)
        settings = {"isa": ttskernels.isa_name(), "threads": threads, "kv_bytes": KV_BYTES, **self.options}
        return {"versions": {**versions("torch", "numpy"), "ttskernels": ttskernels.__version__}, "settings": settings}

    @cached_property
    def engine(self) -> Engine:
        never_stops = torch.zeros(1, self.policy.config.vocab, dtype=torch.int32)
        return Engine(self.policy, next_state=never_stops, kv_bytes=KV_BYTES)

    def generate(self, prompts, samples, tokens, seed):
        started = time.perf_counter()
        sessions = [self.engine.open(prompt, None, max_new_tokens=tokens) for prompt in prompts]
        ids, done, left = {}, threading.Event(), [len(prompts) * samples]
        for i, (session, prompt) in enumerate(zip(sessions, prompts, strict=True)):

            def on_step(ordinal, end, i=i):
                ids[i, ordinal] = end
                left[0] -= 1
                if left[0] == 0 or isinstance(end, BaseException):
                    done.set()

            self.engine.branch(
                session, session.root, key=seed, ordinals=range(samples), path_key=(), sampling=Sampling(1.0),
                max_step_tokens=tokens, max_length=len(prompt) + tokens, on_step=on_step,
            )  # fmt: skip
        done.wait()
        seconds = time.perf_counter() - started
        failed = [end for end in ids.values() if isinstance(end, BaseException)]
        counters = [session.counters for session in sessions]
        for session in sessions:
            self.engine.close(session)
        if failed:
            raise failed[0]
        return {
            "seconds": seconds, "ids": [list(ids[key].ids) for key in sorted(ids)],
            "prefill_seconds": sum(c.prefill_seconds for c in counters),
            "peak_kv_bytes": max(c.peak_kv_bytes for c in counters),
        }  # fmt: skip

    def peaks(self):
        """GFLOP/s and GB/s of all threads, measured now."""
        sys.path.insert(0, str(Path(__file__).parents[1]))
        import conftest

        return conftest.peaks()

    @cached_property
    def verifier(self):
        """The same checkpoint loaded again, with a score head: as large as the policy, and no part of it."""
        head = HeadSpec(rows=(GOOD, BAD), mix=(1.0, 0.0))
        return load_model(self.source, torch.bfloat16, head=head, **self.options)

    def search(self, strategy, prompt, paths, width, steps, step_tokens, seed):
        """Not part of the peers' protocol: what they lack, the driver does for them with `generate` and `score_*`."""
        if step_tokens not in self.backends:
            text = IdPolicy(self.policy.config.vocab, step_tokens)
            engine = Engine(self.policy, self.verifier, next_state=torch.from_numpy(text.next_state), kv_bytes=KV_BYTES)
            self.backends[step_tokens] = LocalBackend(engine, text, EngineVerifier(engine, IdVerifier()))
        problem = ttsearch.Problem(id=str(seed), prompt=" ".join(map(str, prompt)))
        budget = ttsearch.Budget(
            n=paths, width=width, max_steps=steps, max_tokens=steps * step_tokens, max_step_tokens=step_tokens + 1,
            temperature=1.0, seed=seed, aggregate="last", vote="max",
        )  # fmt: skip
        return asyncio.run(self._search(self.backends[step_tokens], strategy, problem, budget))

    async def _search(self, backend, strategy, problem, budget):
        started = time.perf_counter()
        policy = backend.open(problem, budget)
        try:
            await ttsearch.STRATEGIES[strategy].run(problem, policy, budget)
            seconds, cost = time.perf_counter() - started, policy.cost()
        finally:
            policy.close()
        return {
            "seconds": seconds, "prefill_seconds": cost.seconds_prefill, "decode_seconds": cost.seconds_decode,
            "score_seconds": cost.seconds_score, "other_seconds": cost.seconds_other, "decoded": cost.policy.tokens_decoded,
            "scored": cost.verifier.tokens_prefilled, "peak_kv_bytes": cost.peak_kv_bytes,
        }  # fmt: skip


if __name__ == "__main__":
    serve(OursWorker())
