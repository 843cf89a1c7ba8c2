"""Training sequences as ids, in the layout of TRL's PRMTrainer: prompt, then each step and a separator.

One layout serves both models. The policy learns the next token of the solution (after the answer: EOS). The
verifier learns labels, of which those at the separators are read later.
"""

import random
from dataclasses import dataclass

import torch

from .task import (
    LARGEST_VALUE,
    STEP_SEPARATOR,
    ChainProblem,
    apply_operation,
    expected_steps,
    random_problem,
    render_step,
    split,
)
from .tokenizer import EOS_ID, PAD_ID, SEPARATOR_ID

IGNORED = -100


@dataclass(frozen=True)
class Example:
    prompt: str
    steps: tuple[str, ...]
    good: tuple[bool, ...]  # one per step; the sequence may stop early


@dataclass
class Batch:
    ids: torch.Tensor  # [rows, tokens]
    next_ids: torch.Tensor  # language-model target at each position, IGNORED where there is none
    labels: torch.Tensor  # whether the step is right up to this token, IGNORED in the prompt


def training_problem(rng: random.Random) -> ChainProblem:
    while True:
        problem = random_problem(rng, rng.randint(1, 10))
        if split(problem.prompt) == "train":
            return problem


def clean_or_noisy(problem: ChainProblem, error_rate: float, rng: random.Random) -> Example:
    """A worked solution, each step wrong with probability `error_rate`; later steps go on from the slip.

    It stops where a slip has led out of 0..99, because the task defines no such step.
    """
    value, steps, good = problem.start, [], []
    for index, (operator, operand) in enumerate(problem.operations):
        result = apply_operation(value, operator, operand)
        if not 0 <= result <= LARGEST_VALUE:
            return Example(problem.prompt, tuple(steps), tuple(good))
        if rng.random() < error_rate:
            step, stated = _wrong_step(problem, index, value, rng)
        else:
            step, stated = render_step(index, value, operator, operand, result), result
        steps.append(step)
        good.append(stated == result and step == render_step(index, value, operator, operand, result))
        value = stated
    boxed = rng.randint(0, LARGEST_VALUE) if rng.random() < error_rate else value
    return Example(problem.prompt, (*steps, f"\\boxed{{{boxed}}}"), (*good, boxed == value))


def _wrong_step(problem: ChainProblem, index: int, value: int, rng: random.Random) -> tuple[str, int]:
    """Mostly a wrong result; sometimes a miscopied value or operation and what follows from it."""
    operator, operand = problem.operations[index]
    kind = rng.random()
    if kind < 0.15:
        value = _near(value, rng)
    elif kind < 0.25:
        operator, operand = rng.choice(problem.operations)
    elif kind < 0.30:
        operand = max(1, _near(operand, rng))
    result = apply_operation(value, operator, operand)
    if kind >= 0.30 or not 0 <= result <= LARGEST_VALUE:
        result = _near(min(max(result, 0), LARGEST_VALUE), rng)
    return render_step(index, value, operator, operand, result), result


def _near(value: int, rng: random.Random) -> int:
    """Another value of 0..99, usually one digit away."""
    tens, ones = divmod(value, 10)
    draw = rng.random()
    if draw < 0.3:
        tens = rng.randint(0, 9)
    elif draw < 0.6:
        ones = rng.randint(0, 9)
    elif draw < 0.9:
        return min(max(value + rng.choice((-10, -2, -1, 1, 2, 10)), 0), LARGEST_VALUE)
    else:
        return rng.randint(0, LARGEST_VALUE)
    return 10 * tens + ones


def encode(example: Example, tokenizer) -> tuple[list[int], list[int], list[int]]:
    """ids, next_ids and labels. A wrong step is no language-model target.

    Steps after a wrong one are labelled too, on the value they start from: more wrong steps to learn from.
    Every token of a step is labelled with "the step is right so far": at the separator that is the step's
    label, the only one ever read, and on the way there it teaches where the step went wrong.
    """
    ids = tokenizer(example.prompt).input_ids
    targets = [IGNORED] * len(ids)  # targets[i] belongs to ids[i] and is moved one place to the left below
    labels = [IGNORED] * len(ids)
    expected = expected_steps(example.prompt, STEP_SEPARATOR.join(example.steps))
    for step, good, right in zip(example.steps, example.good, expected, strict=True):
        step_ids = tokenizer(step).input_ids
        final = step.startswith("\\boxed")
        ids += [*step_ids, SEPARATOR_ID]
        targets += [*step_ids, EOS_ID if final else SEPARATOR_ID] if good else [IGNORED] * (len(step_ids) + 1)
        right_ids = tokenizer(right or "").input_ids
        agree = 0
        while agree < min(len(step_ids), len(right_ids)) and step_ids[agree] == right_ids[agree]:
            agree += 1
        labels += [int(i < agree) for i in range(len(step_ids))] + [int(good)]
    return ids, [*targets[1:], IGNORED], labels


def collate(rows: list[tuple[list[int], list[int], list[int]]]) -> Batch:
    width = max(len(ids) for ids, _, _ in rows)

    def padded(part: int, fill: int) -> torch.Tensor:
        return torch.tensor([row[part] + [fill] * (width - len(row[part])) for row in rows])

    return Batch(padded(0, PAD_ID), padded(1, IGNORED), padded(2, IGNORED))


def batches_by_length(examples: list[Example], tokenizer, batch_tokens: int, rng: random.Random):
    """Batches of about `batch_tokens` tokens each, rows of like length together, in random order."""
    rows = sorted((encode(example, tokenizer) for example in examples), key=lambda row: len(row[0]))
    groups: list[list] = [[]]
    for row in rows:
        if groups[-1] and len(row[0]) * (len(groups[-1]) + 1) > batch_tokens:
            groups.append([])
        groups[-1].append(row)
    rng.shuffle(groups)
    return [collate(group) for group in groups]


class Pools:
    """Batches drawn from pool 0, 1, 2, ... for ever.

    `position` (pool, batch within it) can be stored and set again: the same batches follow.
    """

    def __init__(self):
        self.position = (0, 0)
        self._pool: tuple[int, list[Batch]] | None = None

    def __next__(self) -> Batch:
        pool, index = self.position
        batches = self.pool(pool)
        self.position = (pool, index + 1) if index + 1 < len(batches) else (pool + 1, 0)
        return batches[index]

    def pool(self, number: int) -> list[Batch]:
        if self._pool is None or self._pool[0] != number:
            self._pool = (number, self.make(number))
        return self._pool[1]

    def make(self, number: int) -> list[Batch]:
        raise NotImplementedError


class EndlessBatches(Pools):
    """Fresh training problems; a pool is about 16 batches, so that rows of like length meet."""

    def __init__(self, error_rate: float, batch_tokens: int, tokenizer, seed: str):
        super().__init__()
        self.error_rate, self.batch_tokens, self.tokenizer, self.seed = (
            error_rate,
            batch_tokens,
            tokenizer,
            seed,
        )

    def make(self, number: int) -> list[Batch]:
        rng = random.Random(f"{self.seed}/{number}")
        return batches_by_length(self.examples(rng), self.tokenizer, self.batch_tokens, rng)

    def examples(self, rng: random.Random) -> list[Example]:
        examples = []
        while len(examples) < max(2, self.batch_tokens // 6):
            example = clean_or_noisy(training_problem(rng), self.error_rate, rng)
            if example.steps:
                examples.append(example)
        return examples


class RolloutBatches(EndlessBatches):
    """Half of each pool drawn from fixed, labelled rollouts, half made afresh with corrupted steps."""

    def __init__(self, rollouts: list[Example], error_rate: float, batch_tokens: int, tokenizer, seed: str):
        super().__init__(error_rate, batch_tokens, tokenizer, seed)
        self.rollouts = rollouts

    def examples(self, rng: random.Random) -> list[Example]:
        fresh = super().examples(rng)
        return fresh[::2] + [rng.choice(self.rollouts) for _ in fresh[1::2]]
