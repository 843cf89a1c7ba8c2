"""Sampling, voting and best-of-N on the dev problems with a plain sampler: checks the recipe's targets.

    python -m ttsearch.demo.evaluate --samples-file FILE [--policy FOLDER] [--verifier FOLDER] [--samples 16]

Problems are of the dev split. Solutions are kept in the file and used again. The last line of the output is
JSON; intervals are 95 % over problems, in points.
"""

import argparse
import json
import math
import statistics
from bisect import bisect_left, bisect_right
from collections import Counter
from pathlib import Path

from . import policy_path, verifier_path
from .sample import sample_to_file
from .task import LEVELS, ChainProblem, check_steps, dev_problems, final_answer, is_correct
from .verify import step_scores

AGGREGATES = {"product": math.prod, "min": min, "last": lambda scores: scores[-1]}


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval, in points of 100."""
    spread = 1.96 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return round(100 * statistics.fmean(values), 1), round(100 * spread, 1)


def area_under_roc(scores: list[float], labels: list[bool]) -> float | None:
    """Chance that a good step scores above a wrong one; ties count half. None without steps of both kinds."""
    wrong = sorted(s for s, good in zip(scores, labels, strict=True) if not good)
    right = [s for s, good in zip(scores, labels, strict=True) if good]
    if not wrong or not right:
        return None
    below = sum(bisect_left(wrong, s) + bisect_right(wrong, s) for s in right)
    return round(below / (2 * len(wrong) * len(right)), 4)


def choose_majority(texts: list[str]) -> int:
    """Index of a solution with the most frequent answer (ties: the earliest); unfinished ones do not vote."""
    answers = [final_answer(text) for text in texts]
    votes = Counter(answer for answer in answers if answer is not None)
    return answers.index(votes.most_common(1)[0][0]) if votes else 0


def choose_best(texts: list[str], scores: list[list[float]], aggregate) -> int:
    """Index of the highest path score among finished solutions (ties: the earliest)."""
    keys = [(final_answer(text) is not None, aggregate(s)) for text, s in zip(texts, scores, strict=True)]
    return keys.index(max(keys))


def evaluate(verifier, tokenizer, problems: list[ChainProblem], texts: list[str]) -> dict:
    """Numbers for equally many solutions of each problem, in the order of the problems."""
    samples = len(texts) // len(problems)
    prompts = [problem.prompt for problem in problems for _ in range(samples)]
    scores = step_scores(verifier, tokenizer, prompts, texts)
    checks = [check_steps(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    right = [is_correct(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    strict = [r and all(c) for r, c in zip(right, checks, strict=True)]

    outcomes: dict[str, list[float]] = {}
    for start in range(0, len(prompts), samples):
        part = slice(start, start + samples)
        chosen = {"majority": choose_majority(texts[part])}
        for name, aggregate in AGGREGATES.items():
            chosen[f"best_{name}"] = choose_best(texts[part], scores[part], aggregate)
        outcomes.setdefault("pass@1", []).append(statistics.fmean(right[part]))
        outcomes.setdefault("pass@1 strict", []).append(statistics.fmean(strict[part]))
        outcomes.setdefault("oracle", []).append(float(any(right[part])))
        for name, index in chosen.items():
            outcomes.setdefault(name, []).append(float(right[start + index]))
        outcomes.setdefault("best_product strict", []).append(float(strict[start + chosen["best_product"]]))

    result: dict = {"problems": len(problems), "samples": samples}
    result["percent"] = {name: mean_and_interval(values) for name, values in outcomes.items()}
    result["percent_by_level"] = {
        name: [
            mean_and_interval([v for v, p in zip(values, problems, strict=True) if p.level == level])[0]
            for level in LEVELS
        ]
        for name, values in outcomes.items()
    }
    for low, high in (("pass@1", "majority"), ("majority", "best_product"), ("majority", "best_min")):
        gains = [b - a for a, b in zip(outcomes[low], outcomes[high], strict=True)]
        result.setdefault("gain_percent", {})[f"{high} - {low}"] = mean_and_interval(gains)
    # Steps up to and including the first wrong one.
    judged = [
        (score, good)
        for of_steps, goods in zip(scores, checks, strict=True)
        for i, (score, good) in enumerate(zip(of_steps, goods, strict=True))
        if all(goods[:i])
    ]
    result["steps"] = {"judged": len(judged), "good": sum(c for _, c in judged)}
    result["step_auc"] = area_under_roc(*map(list, zip(*judged, strict=True)))
    for name, values in (
        ("wrong_steps_scored_above_half_percent", [float(s > 0.5) for s, c in judged if not c]),
        ("good_steps_scored_below_half_percent", [float(s < 0.5) for s, c in judged if c]),
    ):
        result[name] = mean_and_interval(values) if values else None
    result["right_answers_with_a_wrong_step_percent"] = round(100 * (1 - sum(strict) / max(1, sum(right))), 1)
    result["unfinished_percent"] = round(100 * statistics.fmean(final_answer(t) is None for t in texts), 2)
    return result


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples-file", type=Path, required=True)
    parser.add_argument("--policy", type=Path, default=policy_path())
    parser.add_argument("--verifier", type=Path, default=verifier_path())
    parser.add_argument("--per-level", type=int, default=80)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    policy = AutoModelForCausalLM.from_pretrained(args.policy, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.policy)
    problems = dev_problems(args.per_level)
    prompts = [problem.prompt for problem in problems]
    _, texts = sample_to_file(policy, tokenizer, prompts, args.samples, args.seed, args.samples_file)
    verifier = AutoModelForTokenClassification.from_pretrained(args.verifier, dtype=torch.float32).eval()
    result = evaluate(verifier, tokenizer, problems, texts)
    for name, (mean, interval) in result["percent"].items():
        print(f"{name:22s} {mean:5.1f} +- {interval:.1f}   by level {result['percent_by_level'][name]}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
