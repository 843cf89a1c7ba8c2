"""The shipped models: plain Hugging Face folders that do their task."""

import json
import math
import random
import statistics

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer
from ttsearch.demo import MODELS, SIZES, policy_path, verifier_path
from ttsearch.demo.batches import clean_or_noisy
from ttsearch.demo.evaluate import area_under_roc, choose_best, choose_majority
from ttsearch.demo.sample import sample
from ttsearch.demo.task import dev_problems, generate_problems, is_correct, solution
from ttsearch.demo.tokenizer import build_tokenizer
from ttsearch.demo.verify import score_ids, step_scores

FOLDERS = [folder(size) for size in SIZES for folder in (policy_path, verifier_path)]


@pytest.fixture(scope="module")
def verifier():
    return AutoModelForTokenClassification.from_pretrained(verifier_path(), dtype=torch.float32).eval()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_folder_is_complete(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["head_dim"] == 64 and config["dtype"] == "bfloat16"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    for problem in dev_problems(5):
        text = problem.prompt + solution(problem)
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_all_models_stay_below_ten_megabytes():
    assert sum(file.stat().st_size for file in MODELS.rglob("*") if file.is_file()) <= 10_000_000


def test_policy_solves_easy_problems_and_not_all():
    tokenizer = AutoTokenizer.from_pretrained(policy_path())
    policy = AutoModelForCausalLM.from_pretrained(policy_path(), dtype=torch.float32).eval()
    problems = dev_problems(8)
    texts = sample(policy, tokenizer, [p.prompt for p in problems], temperature=0.0)
    right = [is_correct(p.prompt, text) for p, text in zip(problems, texts, strict=True)]
    assert sum(right[:8]) >= 5
    assert sum(right) < len(right)


def test_policy_generates_with_transformers():
    tokenizer = AutoTokenizer.from_pretrained(policy_path())
    policy = AutoModelForCausalLM.from_pretrained(policy_path(), dtype=torch.float32).eval()
    problem = dev_problems(1)[0]
    ids = tokenizer(problem.prompt, return_tensors="pt").input_ids
    out = policy.generate(ids, do_sample=False, max_new_tokens=60)[0, ids.shape[1] :]
    [text] = sample(policy, tokenizer, [problem.prompt], temperature=0.0)
    assert tokenizer.decode(out, skip_special_tokens=True) == text and out[-1] == tokenizer.eos_token_id


def test_score_positions_are_the_separators():
    tokenizer = build_tokenizer()
    ids, positions = score_ids(tokenizer, "2;a+57?", "a:2+57=59\n\n\\boxed{59}")
    assert [tokenizer.decode(ids[: p + 1]) for p in positions] == [
        "2;a+57?a:2+57=59\n\n",
        "2;a+57?a:2+57=59\n\n\\boxed{59}\n\n",
    ]


def test_verifier_scores_a_corrupted_step_lower(verifier):
    tokenizer, rng = AutoTokenizer.from_pretrained(verifier_path()), random.Random(0)
    good, wrong = [], []
    for problem in generate_problems("dev", 12, seed=9):
        example = clean_or_noisy(problem, 0.3, rng)
        if not example.steps or all(example.good):
            continue
        first = example.good.index(False)
        [scores] = step_scores(verifier, tokenizer, [problem.prompt], ["\n\n".join(example.steps)])
        good += scores[:first]
        wrong.append(scores[first])
    assert len(wrong) > 20
    assert statistics.fmean(good) > statistics.fmean(wrong) + 0.5
    assert area_under_roc(good + wrong, [True] * len(good) + [False] * len(wrong)) > 0.95


def test_choices_among_solutions():
    texts = ["\\boxed{1}", "a:1+1=2", "\\boxed{2}", "\\boxed{2}"]
    assert choose_majority(texts) == 2
    assert choose_majority(["a:1"]) == 0
    scores = [[0.1], [0.9], [0.3, 0.9], [0.2]]
    assert choose_best(texts, scores, math.prod) == 2  # the unfinished one cannot win
    assert area_under_roc([0.9, 0.5, 0.5, 0.1], [True, True, False, False]) == 0.875
    assert area_under_roc([0.9], [True]) is None
