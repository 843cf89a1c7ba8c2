"""A prompted yes / no judge: against plain transformers, and incremental against asked anew."""

import asyncio
import copy
import json

import pytest
import torch
from tiny_models import write_tiny
from tiny_tokenizers import llama3, qwen
from ttsearch.verifiers import FAMILIES, TextVerifier, get_family
from ttsearch.verifiers.session import load_verifier

PROBLEM = "what is 12 + 3?"
STEPS = ["we add 12 + 3 = 15.", "so the sum of 15\nis 15, é.", "Therefore \\boxed{15}."]
ASK = (
    "Problem:\n{p}\n\nSolution so far:\n{s}\n\nThe solution may be unfinished. Is every step of it correct? "
    "Answer with Yes or No."
)


def with_answers(tokenizer, *words):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(list(words))
    return tokenizer


TOKENIZERS = {
    "qwen": lambda: with_answers(qwen(), "Yes", " Yes", "No", " No", "yes", " no"),
    "llama3": lambda: with_answers(llama3(), "Yes", "No"),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def judge(request, tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("judge"), TOKENIZERS[request.param]()
    model = write_tiny(folder, "llama", vocab_size=len(tokenizer) + 2, max_position_embeddings=512)
    tokenizer.save_pretrained(folder)
    return folder, model, tokenizer


def plain(model, tokenizer, problem, steps, ask=ASK):
    """Next-token probabilities of the whole vocabulary, then those of every one-token yes against every one-token no."""
    turn = ask.replace("{p}", problem).replace("{s}", "\n\n".join(step.strip() for step in steps))
    ids = tokenizer.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True)["input_ids"]
    with torch.no_grad():
        chances = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
    yes, no = (
        sum(float(chances[i]) for i in {tokenizer.convert_tokens_to_ids(w) for w in words if w in tokenizer.get_vocab()})
        for words in (("Yes", " Yes", "yes"), ("No", " No", " no"))
    )
    return yes / (yes + no)


def score(verifier, steps, cuts=(), problem=PROBLEM):
    async def main(session):
        at, scores, begin = session.root, [], 0
        for end in (*cuts, len(steps)):
            found = await session.score(at, steps[begin:end])
            at, begin, scores = found.handle, end, scores + found.scores
        return scores

    session = verifier.open(problem)
    scores = asyncio.run(main(session))
    cost = session.cost()
    session.close()
    verifier.engine.forget_prompts()
    assert not verifier.engine.verifier_forest._live
    return scores, cost


def test_the_score_is_the_chance_of_yes(judge, cpu_extension):
    folder, model, tokenizer = judge
    with load_verifier(folder, "judge", dtype="fp32", kv_bytes=1 << 24) as verifier:
        for problem in (PROBLEM, "is {solution} a word?"):
            expected = [plain(model, tokenizer, problem, STEPS[: k + 1]) for k in range(3)]
            scores, cost = score(verifier, STEPS, problem=problem)
            assert scores == pytest.approx(expected, abs=1e-5)
            assert score(verifier, STEPS, (1, 2), problem)[0] == scores == score(verifier, STEPS, (2,), problem)[0]
        lengths = [len(verifier.text.extend(verifier.text.start(problem), STEPS[: k + 1]).path.ids) for k in range(3)]
        question = lengths[0] - len(verifier.text.start(problem).ids)
    assert cost.tokens_prefilled < sum(lengths) - lengths[0], "the next step rolls back to where the question began"
    assert cost.tokens_prefilled <= lengths[2] + 2 * question


def test_bf16_is_as_exact_as_plain_transformers(judge, cpu_extension):
    folder, model, tokenizer = judge
    problems = [f"what is {i} + {i + 1}?" for i in range(6)]
    with load_verifier(folder, "judge", dtype="bf16", kv_bytes=1 << 24) as verifier:
        ours = [value for problem in problems for value in score(verifier, STEPS, problem=problem)[0]]

    def cast(dtype):
        other = type(model)(model.config).to(dtype).eval()
        other.load_state_dict(model.state_dict())
        values = [plain(other, tokenizer, problem, STEPS[: k + 1]) for problem in problems for k in range(3)]
        return torch.tensor(values, dtype=torch.float64)

    exact, low = cast(torch.float64), cast(torch.bfloat16)
    error, budget = ((x - exact).square().mean().sqrt() for x in (torch.tensor(ours, dtype=torch.float64), low))
    assert error <= 2 * budget, f"bf16 error {error:.2e}, plain transformers' own {budget:.2e}"


def test_the_question_is_data(judge, tmp_path, cpu_extension):
    folder, model, tokenizer = judge
    mine = {"family": "judge", "turns": [["user", "{problem} | {solution} | right?"]], "between": "\n\n"}
    (tmp_path / "mine.json").write_text(json.dumps(mine | {"answers": [["No"], ["Yes"]]}))
    with load_verifier(folder, tmp_path / "mine.json", dtype="fp32", kv_bytes=1 << 24) as verifier:
        scores, _ = score(verifier, STEPS)
        assert len(verifier.text.head.rows) == 2
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{PROBLEM} | {STEPS[0]} | right?"}], add_generation_prompt=True
    )["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
    chances = logits[tokenizer.convert_tokens_to_ids(["Yes", "No"])].softmax(-1)
    assert scores[0] == pytest.approx(float(chances[1]), abs=1e-5)


def test_answers_are_the_spellings_that_are_one_token():
    rows = {name: TextVerifier(make(), FAMILIES["judge"]).head for name, make in TOKENIZERS.items()}
    assert len(rows["qwen"].rows) == 6 and rows["qwen"].mix == (1, 1, 1, 0, 0, 0)
    assert len(rows["llama3"].rows) == 2 and rows["llama3"].mix == (1, 0)
    tokenizer = TOKENIZERS["qwen"]()
    assert [tokenizer.convert_ids_to_tokens(i) for i in rows["qwen"].rows] == ["Yes", " Yes", "yes", "No", " No", " no"]


def test_answers_the_tokenizer_has_no_token_for():
    with pytest.raises(ValueError, match=r"PRM family 'judge' needs tokens of their own for .*, which are \[\] and \[\] here"):
        TextVerifier(qwen(), FAMILIES["judge"])
    same = get_family("judge", answers=(("Yes", "No"), ("No",)))
    with pytest.raises(ValueError, match="needs tokens of their own"):
        TextVerifier(TOKENIZERS["llama3"](), same)
