import random

import pytest
from ttsearch.demo import MODELS, policy_path, task, verifier_path
from ttsearch.demo.batches import Example, clean_or_noisy, encode, training_problem
from ttsearch.demo.tokenizer import EOS_ID, PAD_ID, SEPARATOR_ID, UNKNOWN, build_tokenizer

PROMPT = "2;a+57;b-49;c*8;d-70?"
SOLUTION = "a:2+57=59\n\nb:59-49=10\n\nc:10*8=80\n\nd:80-70=10\n\n\\boxed{10}"


def test_problem_text_round_trips():
    problem = task.parse_problem(PROMPT)
    assert (problem.level, problem.answer, task.solution(problem)) == (2, "10", SOLUTION)
    for made in task.generate_problems("dev", 5, seed=3):
        assert task.parse_problem(made.prompt) == made
        assert task.is_strictly_correct(made.prompt, task.solution(made))


@pytest.mark.parametrize("prompt", ["", "2?", "2;b+57?", "2;a+57", "2;a/57?", "2;a+57;c-1?", "100;a+1?"])
def test_parse_problem_invalid(prompt):
    with pytest.raises(ValueError, match="got"):
        task.parse_problem(prompt)


@pytest.mark.parametrize(
    "old, new, wrong_steps",
    [
        ("59-49=10", "59-49=20", [1, 2]),  # c reads a value that b did not state
        ("a:2+57=59", "a:2+57=58", [0, 1]),
        ("b:59-49=10", "b:58-49=9", [1, 2]),  # miscopied
        ("b:59-49=10", "b:59+49=108", [1, 2]),  # wrong operation
        ("c:10*8=80", "c:10*7=70", [2, 3]),
        ("c:", "d:", [2]),
        ("\\boxed{10}", "\\boxed{11}", [4]),
        ("\\boxed{10}", "\\boxed{1", [4]),
        ("d:80-70=10\n\n", "", [3]),  # answered too early
        ("\\boxed{10}", "\\boxed{10}\n\n\\boxed{10}", [5]),
        ("59", "059", [0]),
    ],
)
def test_check_steps_catches(old, new, wrong_steps):
    text = SOLUTION.replace(old, new, 1)
    assert [i for i, good in enumerate(task.check_steps(PROMPT, text)) if not good] == wrong_steps
    assert not task.is_strictly_correct(PROMPT, text)


def test_steps_after_a_slip_are_judged_on_the_stated_value():
    text = "a:2+57=58\n\nb:58-49=9\n\nc:9*8=72\n\nd:72-70=2\n\n\\boxed{2}"
    assert task.check_steps(PROMPT, text) == [False, True, True, True, True]
    assert not task.is_correct(PROMPT, text)


def test_two_slips_that_cancel_are_right_but_not_strictly():
    text = SOLUTION.replace("=59", "=58").replace("b:59-49=10", "b:58-49=10")
    assert task.is_correct(PROMPT, text) and not task.is_strictly_correct(PROMPT, text)


@pytest.mark.parametrize("text", ["", "a:2+57=59", SOLUTION[:-1], SOLUTION + "\n\na:2+57=59"])
def test_unfinished_is_wrong(text):
    assert task.final_answer(text) is None and not task.is_correct(PROMPT, text)


def test_split_is_stable_and_disjoint():
    prompts = {
        part: {p.prompt for p in task.generate_problems(part, 40, seed=1)}
        for part in ("train", "dev", "test")
    }
    assert all(task.split(prompt) == part for part, ps in prompts.items() for prompt in ps)
    assert not prompts["train"] & prompts["dev"] and not prompts["dev"] & prompts["test"]
    # Written down once: a change here would leak test problems into training.
    assert [task.split(f"{n};a+1?") for n in range(2, 98)].count("train") == 82
    assert task.split(PROMPT) == "train"


def test_held_out_set():
    problems = task.test_problems()
    assert len(problems) == len({p.prompt for p in problems}) >= 500
    assert all(sum(p.level == level for p in problems) >= 100 for level in task.LEVELS)
    assert problems == task.test_problems() and problems[0].prompt == task.test_problems()[0].prompt
    assert all(task.split(p.prompt) == "test" for p in problems)
    assert not {p.prompt for p in problems} & {p.prompt for p in task.dev_problems()}
    rng = random.Random(0)
    assert all(task.split(training_problem(rng).prompt) == "train" for _ in range(500))


def test_generate_problems_invalid():
    with pytest.raises(ValueError, match="'validation'"):
        task.generate_problems("validation", 1, seed=0)


def test_tokenizer_round_trip():
    tokenizer = build_tokenizer()
    for problem in task.generate_problems("dev", 30, seed=2):
        text = problem.prompt + task.solution(problem)
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert ids == tokenizer(problem.prompt).input_ids + tokenizer(task.solution(problem)).input_ids
        assert ids.count(SEPARATOR_ID) == len(problem.operations)
    assert tokenizer("\n\n").input_ids == [SEPARATOR_ID]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (EOS_ID, PAD_ID, None)
    assert tokenizer.convert_ids_to_tokens(tokenizer("z").input_ids) == [UNKNOWN]


def test_noisy_solutions_agree_with_the_checker():
    rng = random.Random(5)
    tokenizer = build_tokenizer()
    wrong = 0
    for _ in range(300):
        example = clean_or_noisy(training_problem(rng), 0.2, rng)
        if not example.steps:
            continue
        text = task.STEP_SEPARATOR.join(example.steps)
        assert tuple(task.check_steps(example.prompt, text)) == example.good
        ids, next_ids, labels = encode(example, tokenizer)
        shown = [label for i, label in zip(ids, labels, strict=True) if i == SEPARATOR_ID and label >= 0]
        assert shown == [int(good) for good in example.good]
        assert len(ids) == len(next_ids) == len(labels) <= 256
        wrong += not all(example.good)
    assert wrong > 100


def test_clean_example_speaks_the_solution():
    tokenizer = build_tokenizer()
    problem = task.parse_problem(PROMPT)
    ids, next_ids, labels = encode(clean_or_noisy(problem, 0.0, random.Random(0)), tokenizer)
    assert tokenizer.decode([i for i in next_ids if i >= 0]) == SOLUTION + "<eos>"
    assert tokenizer.decode(ids) == PROMPT + SOLUTION + "\n\n"
    assert set(labels) == {-100, 1} and labels.count(-100) == len(tokenizer(PROMPT).input_ids)


def test_labels_turn_bad_at_the_first_wrong_token():
    tokenizer = build_tokenizer()
    text = SOLUTION.replace("59-49=10", "59-49=15")
    steps = tuple(task.split_steps(text))
    ids, _, labels = encode(Example(PROMPT, steps, tuple(task.check_steps(PROMPT, text))), tokenizer)
    assert "".join(tokenizer.decode([i]) for i, label in zip(ids, labels, strict=True) if label == 1) == (
        "a:2+57=59\n\nb:59-49=1c:1d:80-70=10\n\n\\boxed{10}\n\n"
    )
    assert (
        "".join(tokenizer.decode([i]) for i, label in zip(ids, labels, strict=True) if label == 0)
        == "5\n\n0*8=80\n\n"
    )


def test_model_paths():
    assert policy_path("base") == MODELS / "policy-base" and verifier_path().name == "verifier-base"
    with pytest.raises(ValueError, match="'huge'"):
        policy_path("huge")
