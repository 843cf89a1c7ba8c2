"""The demo task: chains of two-digit arithmetic, one operation a step, every step checkable.

    prompt    2;a+57;b-49;c+88;d-70?
    solution  a:2+57=59\\n\\nb:59-49=10\\n\\nc:10+88=98\\n\\nd:98-70=28\\n\\n\\boxed{28}

Operations run from left to right on values of 0..99. A step is right when it does the next operation of the
prompt on the value stated just before it, so one slip makes one wrong step and a wrong final answer.
Level L has 2L-1 or 2L operations.
"""

import hashlib
import random
import re
from dataclasses import dataclass

STEP_SEPARATOR = "\n\n"
LETTERS = "abcdefghij"
MAX_OPERATIONS = len(LETTERS)
LEVELS = (1, 2, 3, 4, 5)
LARGEST_VALUE = 99
# Shares of 100 hash buckets. Everything else is training.
TEST_BUCKETS = 5
DEV_BUCKETS = 5

_PROMPT = re.compile(r"(\d{1,2})((?:;[a-j][+\-*]\d{1,2}){1,10})\?")
_STEP = re.compile(r"([a-j]):(-?\d{1,4})([+\-*])(\d{1,2})=(-?\d{1,4})")
_FINAL = re.compile(r"\\boxed\{(-?\d{1,4})\}")


@dataclass(frozen=True)
class ChainProblem:
    prompt: str
    start: int
    operations: tuple[tuple[str, int], ...]  # (operator, operand)

    @property
    def level(self) -> int:
        return (len(self.operations) + 1) // 2

    @property
    def answer(self) -> str:
        value = self.start
        for operator, operand in self.operations:
            value = apply_operation(value, operator, operand)
        return str(value)


def apply_operation(value: int, operator: str, operand: int) -> int:
    if operator == "+":
        return value + operand
    if operator == "-":
        return value - operand
    if operator == "*":
        return value * operand
    raise ValueError(f"operator must be one of + - *, got {operator!r}")


def parse_problem(prompt: str) -> ChainProblem:
    match = _PROMPT.fullmatch(prompt)
    if match is None:
        raise ValueError(f"prompt must look like '2;a+57;b-49?', got {prompt!r}")
    parts = match.group(2).split(";")[1:]
    if [part[0] for part in parts] != list(LETTERS[: len(parts)]):
        raise ValueError(f"operations must be lettered a, b, c, ... in order, got {prompt!r}")
    operations = tuple((part[1], int(part[2:])) for part in parts)
    return ChainProblem(prompt, int(match.group(1)), operations)


def split(problem_text: str) -> str:
    """Which part of the data a prompt belongs to: "train", "dev" or "test". Depends on its text alone."""
    bucket = int.from_bytes(hashlib.sha256(problem_text.encode()).digest()[:8], "big") % 100
    if bucket < TEST_BUCKETS:
        return "test"
    return "dev" if bucket < TEST_BUCKETS + DEV_BUCKETS else "train"


def random_problem(rng: random.Random, num_operations: int) -> ChainProblem:
    """A problem of any split; every intermediate value lies in 0..99."""
    value = start = rng.randint(2, LARGEST_VALUE)
    operations = []
    for _ in range(num_operations):
        choices = [op for op, possible in (
            ("+", value < LARGEST_VALUE), ("-", value > 0), ("*", 0 < value * 3 <= LARGEST_VALUE)
        ) if possible]  # fmt: skip
        operator = rng.choice(choices)
        if operator == "+":
            operand = rng.randint(1, LARGEST_VALUE - value)
        elif operator == "-":
            operand = rng.randint(1, value)
        else:
            operand = rng.randint(3, min(9, LARGEST_VALUE // value))
        operations.append((operator, operand))
        value = apply_operation(value, operator, operand)
    text = ";".join(f"{LETTERS[i]}{op}{operand}" for i, (op, operand) in enumerate(operations))
    return ChainProblem(f"{start};{text}?", start, tuple(operations))


def generate_problems(part: str, per_level: int, seed: int) -> list[ChainProblem]:
    """`per_level` distinct problems of each level, all of the split `part`; the same for the same seed."""
    if part not in ("train", "dev", "test"):
        raise ValueError(f'part must be "train", "dev" or "test", got {part!r}')
    problems = []
    for level in LEVELS:
        rng = random.Random(f"{part}/{level}/{seed}")
        seen: set[str] = set()
        while len(seen) < per_level:
            problem = random_problem(rng, rng.choice((2 * level - 1, 2 * level)))
            if split(problem.prompt) == part and problem.prompt not in seen:
                seen.add(problem.prompt)
                problems.append(problem)
    return problems


def test_problems(per_level: int = 120) -> list[ChainProblem]:
    """The fixed held-out set for reported numbers. Tune on `dev_problems`, never on these."""
    return generate_problems("test", per_level, seed=0)


test_problems.__test__ = False  # the name is not a request to pytest


def dev_problems(per_level: int = 80) -> list[ChainProblem]:
    return generate_problems("dev", per_level, seed=0)


def render_step(index: int, value: int, operator: str, operand: int, result: int) -> str:
    return f"{LETTERS[index]}:{value}{operator}{operand}={result}"


def solution(problem: ChainProblem) -> str:
    value, steps = problem.start, []
    for index, (operator, operand) in enumerate(problem.operations):
        result = apply_operation(value, operator, operand)
        steps.append(render_step(index, value, operator, operand, result))
        value = result
    return STEP_SEPARATOR.join([*steps, f"\\boxed{{{value}}}"])


def split_steps(solution_text: str) -> list[str]:
    """Steps of a solution, the final answer line included. A separator at the very end opens no step."""
    return solution_text.removesuffix(STEP_SEPARATOR).split(STEP_SEPARATOR)


def expected_steps(prompt: str, solution_text: str) -> list[str | None]:
    """For each step, the one right step given the value stated just before it; None if there is none."""
    problem = parse_problem(prompt)
    stated: int | None = problem.start
    expected: list[str | None] = []
    for index, step in enumerate(split_steps(solution_text)):
        if stated is None or index > len(problem.operations):
            expected.append(None)
        elif index == len(problem.operations):
            expected.append(f"\\boxed{{{stated}}}")
        else:
            operator, operand = problem.operations[index]
            result = apply_operation(stated, operator, operand)
            expected.append(render_step(index, stated, operator, operand, result))
        match = _STEP.fullmatch(step)
        stated = int(match.group(5)) if match else None
    return expected


def check_steps(prompt: str, solution_text: str) -> list[bool]:
    """For each step of the text, whether it is right given the value stated by the step before it."""
    return [
        s == e for s, e in zip(split_steps(solution_text), expected_steps(prompt, solution_text), strict=True)
    ]


def final_answer(solution_text: str) -> str | None:
    """What the last step boxes; None for an unfinished solution."""
    match = _FINAL.fullmatch(split_steps(solution_text)[-1])
    return match.group(1) if match else None


def is_correct(prompt: str, solution_text: str) -> bool:
    """Whether the final answer is right, by whatever steps. An unfinished solution is wrong."""
    return final_answer(solution_text) == parse_problem(prompt).answer


def is_strictly_correct(prompt: str, solution_text: str) -> bool:
    """Whether the final answer is right and so is every step on the way."""
    return is_correct(prompt, solution_text) and all(check_steps(prompt, solution_text))
