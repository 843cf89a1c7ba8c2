"""Beam search as a user of the peers would build it: one engine samples, one scores, the loop is here.

Nothing of the loop itself is timed: seconds are those that the workers report for their calls.
"""

from __future__ import annotations

import random

from workloads import Workload

# A published stack scores every path from its first token at each step. These two of twelve steps hold a sixth of those tokens
# (the mean path length of steps 6 and 7 is that of all), so they are timed and counted six times. The other steps choose by lot.
TIMED_STEPS = {12: (6, 7)}


def beam_search(policy, reward, workload: Workload, round_: int, whole: bool) -> dict:
    """Run `workload`; `policy` and `reward` are workers. `whole`: every path is scored from its first token at each step.

    Returns:
        seconds, and its parts; `scored`: tokens that the reward model read; `estimated` where not every step was timed.
    """
    prompt, keep = workload.prompt_ids(round_), workload.samples // workload.width
    timed = TIMED_STEPS.get(workload.steps) if whole else None
    draw = random.Random(round_)
    decode_seconds = score_seconds = 0.0
    scored = 0
    paths: list[list[int]] = [[]]
    parents = [-1]
    reward.call("score_begin", prompt=prompt)
    for step in range(1, workload.steps + 1):
        children = workload.samples if step == 1 else workload.width
        grown = policy.call(
            "generate", prompts=[prompt + path for path in paths], samples=children, tokens=workload.tokens,
            seed=1000 * round_ + step,
        )  # fmt: skip
        decode_seconds += grown["seconds"]
        new, above = grown["ids"], [parent for parent in parents for _ in range(children)]
        paths = [path + ids for path, ids in zip([p for p in paths for _ in range(children)], new, strict=True)]
        if timed and step not in timed:
            scores = [draw.random() for _ in paths]
        elif whole:
            answer = reward.call("score_whole", paths=[prompt + path for path in paths])
            scores, scored = answer["scores"], scored + sum(len(prompt) + len(path) for path in paths)
            score_seconds += answer["seconds"]
        else:
            answer = reward.call("score_steps", parents=above, steps=new)
            scores, scored = answer["scores"], scored + sum(map(len, new)) + (len(prompt) if step == 1 else 0)
            score_seconds += answer["seconds"]
        if len(scores) != len(paths):
            raise ValueError(f"the reward model gave {len(scores)} scores for {len(paths)} paths")
        parents = sorted(range(len(paths)), key=lambda i: (-scores[i], i))[:keep]
        paths = [paths[i] for i in parents]
    share = workload.steps / len(timed) if timed else 1.0
    return {
        "seconds": decode_seconds + share * score_seconds, "decode_seconds": decode_seconds,
        "score_seconds": share * score_seconds, "decoded": workload.decoded, "scored": round(share * scored),
        "estimated": bool(timed),
    }  # fmt: skip
