"""Step scores of whole solutions, by re-reading them: the plain definition, for recipe and tests."""

import torch

from .task import split_steps
from .tokenizer import PAD_ID, SEPARATOR_ID


def score_ids(tokenizer, prompt: str, solution_text: str) -> tuple[list[int], list[int]]:
    """ids = prompt ++ (step ++ separator) for each step, and the positions of those separators."""
    ids, positions = list(tokenizer(prompt).input_ids), []
    for step in split_steps(solution_text):
        ids += [*tokenizer(step).input_ids, SEPARATOR_ID]
        positions.append(len(ids) - 1)
    return ids, positions


@torch.inference_mode()
def step_scores(
    verifier, tokenizer, prompts: list[str], solutions: list[str], rows: int = 64
) -> list[list[float]]:
    """Probability of label 1 at the separator behind each step, one list per solution."""
    encoded = [score_ids(tokenizer, p, s) for p, s in zip(prompts, solutions, strict=True)]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]))
    scores: list[list[float]] = [[] for _ in encoded]
    for start in range(0, len(order), rows):
        chunk = order[start : start + rows]
        width = max(len(encoded[i][0]) for i in chunk)
        ids = torch.tensor([encoded[i][0] + [PAD_ID] * (width - len(encoded[i][0])) for i in chunk])
        good = verifier(input_ids=ids, use_cache=False).logits.float().softmax(-1)[..., 1]
        for row, i in enumerate(chunk):
            scores[i] = good[row, encoded[i][1]].tolist()
    return scores
