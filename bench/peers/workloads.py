"""What is run: prompts of random ids, a new one each round (so a prefix cache helps within a call, not between calls)."""

from __future__ import annotations

import random
from dataclasses import dataclass

VOCAB = {"smollm2": 49152, "qwen-0.5b": 151936}


@dataclass(frozen=True)
class Workload:
    """`kind` "samples": `samples` of `tokens` after a prompt. "search": so many paths over `steps` of `tokens`, `width` children
    to a survivor, every step scored by a reward model of the policy's size. "strategies": our own search beside our best-of-N."""

    name: str
    title: str
    prompt: int
    samples: int
    tokens: int
    model: str = "smollm2"
    kind: str = "samples"
    width: int = 1
    steps: int = 1

    @property
    def decoded(self) -> int:
        return self.samples * self.steps * self.tokens

    @property
    def context(self) -> int:
        """Tokens of the longest path, and a few."""
        return self.prompt + self.steps * self.tokens + 16

    @property
    def cells(self) -> int:
        """Tokens that are alive at once, at most: the prompt, survivors' paths, their children and the step before; and a few."""
        return self.prompt + (self.samples // self.width * self.steps + 2 * self.samples) * self.tokens + 512

    def prompt_ids(self, round_: int) -> list[int]:
        draw = random.Random(f"{self.name} {round_}")
        return [draw.randrange(10, VOCAB.get(self.model, 33) - 10) for _ in range(self.prompt)]


SEARCH = {"prompt": 256, "samples": 64, "tokens": 32, "width": 4, "steps": 12}
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("W0", "search beside best-of-N with the same tokens, scored once at the end", **SEARCH, kind="strategies"),
        Workload("W1", "best-of-N", 1024, 64, 64),
        Workload("W2", "small batch", 256, 4, 64),
        Workload("W3", "beam search, every step scored", **SEARCH, kind="search"),
        Workload("W5", "a 0.5B policy (random weights)", 512, 16, 64, model="qwen-0.5b"),
        Workload("W1-n1", "W1 with 1 sample", 1024, 1, 64),
        Workload("W1-n4", "W1 with 4 samples", 1024, 4, 64),
        Workload("W1-n16", "W1 with 16 samples", 1024, 16, 64),
        Workload("W1-n256", "W1 with 256 samples", 1024, 256, 64),
    )
}
SWEEP = ("W1-n1", "W1-n4", "W1-n16", "W1", "W1-n256")
