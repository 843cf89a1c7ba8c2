"""A search on token ids alone, for engine tests: beam-like growth of a tree, every step scored."""

from __future__ import annotations

import queue
import random
from concurrent.futures import Future

import torch

from ttskernels.engine.ahead import Wish
from ttskernels.engine.batcher import Engine
from ttskernels.engine.keys import root_key
from ttskernels.engine.work import Sampling, StepEnd
from ttskernels.models import load_model

STEP, END = 5, 7  # token ids that end a step and a solution in the tests' automaton


def stop_table(vocab: int = 131) -> torch.Tensor:
    table = torch.zeros(1, vocab, dtype=torch.int32)
    table[0, STEP::9], table[0, END] = -1, -2  # every ninth id ends a step: random models get there soon
    return table


def make_engine(
    policy_folder, verifier_folder=None, dtype=torch.float32, impl="auto", kv_bytes=1 << 28, kv="auto", **options
) -> Engine:
    verifier = load_model(verifier_folder, dtype, impl, kv=kv) if verifier_folder else None
    policy = load_model(policy_folder, dtype, impl, kv=kv)
    return Engine(policy, verifier, next_state=stop_table(), kv_bytes=kv_bytes, **options)


class Search:
    """Grow `width` children of the `keep` best leaves for `depth` steps; remembers ids and scores by path key.

    `guess`: draws which leaves, in which order and with how many children, are wished to be continued ahead.
    """

    def __init__(
        self, engine: Engine, prompt: list[int], seed: int, *, width=4, keep=2, depth=3, step_tokens=12,
        guess: random.Random | None = None, sure_share: float = 0.3,
    ):  # fmt: skip
        self.guess, self.sure_share = guess, sure_share
        self.engine, self.prompt, self.seed = engine, prompt, seed
        self.width, self.keep, self.depth, self.step_tokens = width, keep, depth, step_tokens
        self.tree: dict[tuple[int, ...], tuple[tuple[int, ...], str, float]] = {}

    def start(self) -> None:
        new = (self.depth + 1) * self.step_tokens
        self.session = self.engine.open(self.prompt, self.prompt, max_new_tokens=new)
        self.events: queue.SimpleQueue = queue.SimpleQueue()
        self.leaves = [((), self.session.root, self.session.verifier_root, root_key(self.seed, str(self.prompt)))]

    def submit(self) -> None:
        self.due = 0
        for path_key, node, _, key in self.leaves:
            self.due += self.width
            self.engine.branch(
                self.session, node, key=key, ordinals=range(self.width), path_key=path_key,
                sampling=Sampling(1.0), max_step_tokens=self.step_tokens, max_length=10**6,
                on_step=lambda o, end, p=path_key: self.events.put(((*p, o), end)),
            )  # fmt: skip

    def finish_step(self) -> None:
        parents = {path_key: verifier for path_key, _, verifier, _ in self.leaves}
        ends: list[tuple[tuple[int, ...], StepEnd, Future]] = []
        for _ in range(self.due):
            path_key, end = self.events.get(timeout=60)
            if isinstance(end, BaseException):
                raise end
            ids = list(end.ids)
            job = self.engine.score(self.session, parents[path_key[:-1]], ids, [len(ids) - 1])
            ends.append((path_key, end, job))
            if self.guess is not None:
                self.wish([(path_key, end) for path_key, end, _ in ends if not end.finished])
        scored = []
        for path_key, end, job in sorted(ends, key=lambda e: e[0]):
            node, scores = job.result(timeout=60)
            self.tree[path_key] = (end.ids, end.reason, scores[0])
            scored.append((scores[0], path_key, end, node))
        scored.sort(key=lambda s: (-s[0], s[1]))
        keep = [s for s in scored if not s[2].finished][: self.keep]
        drop = [s for s in scored if s not in keep]
        old = [leaf for leaf in self.leaves if leaf[0]]
        self.engine.release(
            self.session,
            policy=[s[2].node for s in drop] + [leaf[1] for leaf in old],
            verifier=[s[3] for s in drop] + [leaf[2] for leaf in old],
        )
        self.leaves = [(path_key, end.node, node, end.key) for _, path_key, end, node in keep]

    def wish(self, open_ends: list[tuple[tuple[int, ...], StepEnd]]) -> None:
        chosen = self.guess.sample(open_ends, self.guess.randint(0, len(open_ends)))
        wishes = [
            Wish(end.node, end.key, path, 0, self.guess.randint(1, self.width + 1), self.guess.random() < self.sure_share)
            for path, end in chosen
        ]
        max_step_tokens = self.step_tokens - (self.guess.random() < 0.1)  # of another step: never the child asked for
        self.engine.ahead(
            self.session, wishes, sampling=Sampling(1.0), max_step_tokens=max_step_tokens, max_length=10**6, group=self
        )

    def run(self) -> dict:
        return run_together([self])[0]


def run_together(searches: list[Search]) -> list[dict]:
    """All searches at once, step by step, so that their branches share batches."""
    for search in searches:
        search.start()
    for _ in range(max(s.depth for s in searches)):
        for search in searches:
            search.submit()
        for search in searches:
            search.finish_step()
    for search in searches:
        search.engine.close(search.session)
    return [s.tree for s in searches]
