"""Train a demo policy and its verifier from nothing, on two CPU cores.

    python -m ttsearch.demo.train --size base --seed 0 --out runs/demo-base

Stages, each skipped when its output exists, each continued from its last checkpoint:
    policy    next-token training until the solve rate on dev problems reaches the size's target -> policy/
    trunk     the same weights trained on to solve the task, with label loss on corrupted steps
    rollouts  solutions sampled from the policy for training problems, each step labelled by the exact checker
    verifier  the trunk, two more layers and the head trained on those labels and on fresh corrupted steps,
              first the new layers alone, then everything -> verifier/
    report    dev numbers of both -> report.json
"""

import argparse
import dataclasses
import json
import random
import statistics
import time
from pathlib import Path

import torch

from .batches import EndlessBatches, Example, RolloutBatches, training_problem
from .evaluate import evaluate
from .grow import grow
from .learn import cosine, learn, make_optimizer, save_atomically, warm_up
from .sample import sample, sample_to_file
from .sizes import RECIPES, Recipe, llama_config
from .task import LEVELS, check_steps, dev_problems, is_correct, split_steps
from .tokenizer import build_tokenizer

LONGEST_SEQUENCE = 256


def new_model(recipe: Recipe, extra_layers: int = 0):
    """The verifier's class from the start: its trunk speaks through the tied embedding while it learns."""
    from transformers import LlamaForTokenClassification

    config = llama_config(recipe, extra_layers, num_labels=2, classifier_dropout=0.0)
    return LlamaForTokenClassification(config)


def as_policy(model, recipe: Recipe):
    from transformers import LlamaForCausalLM

    policy = LlamaForCausalLM(llama_config(recipe))
    policy.model.load_state_dict(model.model.state_dict())
    return policy.eval()


def save_model(model, tokenizer, folder: Path) -> None:
    """A plain Hugging Face folder in bfloat16; appears under its name only when complete."""
    partial = folder.with_name(folder.name + ".partial")
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    settings = partial / "tokenizer_config.json"
    # A class name that older transformers know as well.
    settings.write_text(settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    for file in partial.iterdir():
        file.chmod(0o644)
    partial.rename(folder)


def load_policy(folder: Path):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def solve_rates(policy, tokenizer, per_level: int) -> list[float]:
    """Share of dev problems solved at temperature 1, one sample each, by level."""
    problems = dev_problems(per_level)
    texts = sample(policy, tokenizer, [p.prompt for p in problems])
    right = [is_correct(p.prompt, text) for p, text in zip(problems, texts, strict=True)]
    by_level = [[r for r, p in zip(right, problems, strict=True) if p.level == level] for level in LEVELS]
    return [statistics.fmean(rights) for rights in by_level]


def policy_stage(recipe: Recipe, tokenizer, seed: int, out: Path) -> None:
    if (out / "policy").exists():
        return
    model, best_file = new_model(recipe), out / "policy-best.pt"
    best = (
        torch.load(best_file, weights_only=True)
        if best_file.exists()
        else {"distance": 1.0, "reached": False}
    )

    def stop(update: int, token_loss: float) -> bool:
        if update < recipe.policy_updates and (
            update % recipe.check_every or token_loss > recipe.check_below_loss
        ):
            return False
        rounded = as_policy(model, recipe).to(torch.bfloat16).float()  # what will be shipped
        rates = solve_rates(rounded, tokenizer, recipe.dev_per_level)
        rate = statistics.fmean(rates)
        print(
            f"policy: update {update}  dev solve rate {rate:.3f}  by level {[round(r, 2) for r in rates]}",
            flush=True,
        )
        distance, reached = abs(rate - recipe.policy_target), rate >= recipe.policy_target
        if distance < best["distance"]:
            note = {"update": update, "dev_solve_rate": rate, "dev_solve_rate_by_level": rates}
            best.update(distance=distance, reached=reached, note=note, weights=rounded.state_dict())
        best["reached"] = reached
        save_atomically(best, best_file)
        return reached

    if not best["reached"]:
        learn(
            "policy",
            model,
            make_optimizer(model, recipe.learning_rate),
            EndlessBatches(0.0, recipe.batch_tokens, tokenizer, f"{seed}/policy"),
            updates=recipe.policy_updates,
            learning_rate=warm_up(recipe.learning_rate, recipe.warmup_updates),
            label_weight=0.0,
            checkpoint=out / "policy.pt",
            stop=stop,
        )
    (out / "policy.json").write_text(json.dumps(best["note"]) + "\n")
    policy = as_policy(model, recipe)
    policy.load_state_dict(best["weights"])
    save_model(policy, tokenizer, out / "policy")


def trunk_stage(recipe: Recipe, tokenizer, seed: int, out: Path):
    """The trunk with its head; goes on from the policy's last checkpoint, optimiser state included."""
    model = new_model(recipe)
    optimizer = make_optimizer(model, recipe.learning_rate)
    start = torch.load(out / "policy.pt", weights_only=True)
    model.load_state_dict(start["model"])
    optimizer.load_state_dict(start["optimizer"])
    learn(
        "trunk",
        model,
        optimizer,
        EndlessBatches(recipe.error_rate, recipe.batch_tokens, tokenizer, f"{seed}/trunk"),
        updates=recipe.trunk_updates,
        learning_rate=cosine(recipe.learning_rate, recipe.trunk_updates),
        label_weight=1.0,
        checkpoint=out / "trunk.pt",
    )
    return model


def rollout_stage(recipe: Recipe, tokenizer, seed: int, out: Path) -> list[Example]:
    rng = random.Random(f"{seed}/rollouts")
    problems = [training_problem(rng).prompt for _ in range(recipe.rollout_problems)]
    policy, file = load_policy(out / "policy"), out / "rollouts.jsonl"
    prompts, texts = sample_to_file(policy, tokenizer, problems, recipe.rollouts_per_problem, seed, file)
    return [
        Example(prompt, tuple(split_steps(text)), tuple(check_steps(prompt, text)))
        for prompt, text in zip(prompts, texts, strict=True)
        if len(tokenizer(prompt + text).input_ids) < LONGEST_SEQUENCE
    ]


def verifier_stage(recipe: Recipe, tokenizer, seed: int, out: Path, trunk, rollouts: list[Example]) -> None:
    model = new_model(recipe, recipe.verifier_extra_layers)
    grow(trunk, model, next(EndlessBatches(recipe.verifier_error_rate, 8000, tokenizer, f"{seed}/grow")))
    for name, frozen in (("verifier", True), ("finetune", False)):
        # First the new layers alone: they are fitted to the trunk's states. Then everything, at a lower rate.
        model.model.embed_tokens.requires_grad_(not frozen)
        for layer in model.model.layers[: recipe.layers]:
            layer.requires_grad_(not frozen)
        rate = recipe.verifier_learning_rate if frozen else recipe.finetune_learning_rate
        updates = recipe.verifier_updates if frozen else recipe.finetune_updates
        learn(
            name,
            model,
            make_optimizer(model, rate),
            RolloutBatches(
                rollouts, recipe.verifier_error_rate, recipe.batch_tokens, tokenizer, f"{seed}/{name}"
            ),
            updates=updates,
            learning_rate=cosine(rate, updates, warmup_updates=50),
            label_weight=1.0,
            checkpoint=out / f"{name}.pt",
        )
    save_model(model, tokenizer, out / "verifier")


def train(recipe: Recipe, seed: int, out: Path) -> dict:
    """All stages; returns the report."""
    from transformers import LlamaForTokenClassification

    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    policy_stage(recipe, tokenizer, seed, out)
    if not (out / "verifier").exists():
        model = trunk_stage(recipe, tokenizer, seed, out)
        verifier_stage(recipe, tokenizer, seed, out, model, rollout_stage(recipe, tokenizer, seed, out))
    report = out / "report.json"
    if not report.exists():
        verifier = LlamaForTokenClassification.from_pretrained(out / "verifier", dtype=torch.float32).eval()
        policy = load_policy(out / "policy")
        problems = dev_problems(recipe.report_per_level)
        prompts = [problem.prompt for problem in problems]
        _, texts = sample_to_file(
            policy, tokenizer, prompts, recipe.report_samples, seed, out / "dev_samples.jsonl"
        )
        result = evaluate(verifier, tokenizer, problems, texts)
        report.write_text(json.dumps(result, indent=1) + "\n")
    return json.loads(report.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=sorted(RECIPES), default="base")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--policy-target", type=float, help="dev solve rate at which the policy stops")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = RECIPES[args.size]
    if args.policy_target is not None:
        recipe = dataclasses.replace(recipe, policy_target=args.policy_target)
    started = time.monotonic()
    report = train(recipe, args.seed, args.out)
    print(f"this run took {(time.monotonic() - started) / 60:.1f} min", flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
