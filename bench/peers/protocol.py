"""How the driver talks to a worker: one JSON object a line, over stdin and stdout. Needs the standard library alone.

    -> {"call": "generate", "prompts": [[1, 2, 3]], "samples": 4, "tokens": 64, "seed": 0}
    <- {"seconds": 1.5, "ids": [[..64 ids..], ..4 of them..]}
    <- {"error": "ValueError: ..."}     the worker lives on

A worker is a class with `load` and some of the other calls below; `seconds` is what the call took inside the worker, so that
neither Python objects nor pipes are part of a time. Whatever a library prints goes to stderr. Calls:

    load(model, precision, threads, context, sequences) -> versions, settings
    generate(prompts, samples, tokens, seed) -> seconds, ids: `tokens` ids for each sample of each prompt, in order
    score_begin(prompt)                      a process reward model forgets what it knew; not timed
    score_steps(parents, steps) -> seconds, scores: path i is path parents[i] (or the prompt, -1) of the last call + steps[i]
    score_whole(paths) -> seconds, scores: nothing is kept from call to call
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import traceback

GOOD, BAD = 17, 23  # vocabulary rows of the reward model's head: a step scores softmax(GOOD, BAD)[0] at its last token


def serve(worker) -> None:
    """Answer calls until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("call"))(**request) or {}
        except Exception as error:  # the driver decides; the others' runs go on
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def versions(*names: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in names}


def shared_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def chance(good: float, bad: float) -> float:
    """Softmax of two logits."""
    from math import exp

    return 1 / (1 + exp(min(bad - good, 700.0)))
