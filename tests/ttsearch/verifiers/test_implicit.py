"""Implicit PRMs against the published procedure in plain transformers, step by step, in a tree and in any company."""

import asyncio
import random

import pytest
import torch
from tiny_models import write_tiny
from tiny_tokenizers import bytes_only, llama3, qwen
from ttsearch.verifiers import FAMILIES, TextVerifier
from ttsearch.verifiers.session import load_verifier

PROBLEM = "what is 12 + 3 - 1?"
STEPS = ["Step 1: we add 12 + 3 = 15.", "so the sum of 15 - 1 is 14, é.", "Therefore\nthe answer equals \\boxed{14}."]
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}"
COEF = 0.001


def plain_bytes():
    tokenizer = bytes_only()
    tokenizer.chat_template = CHAT
    return tokenizer


TOKENIZERS = {"qwen": qwen, "llama3": llama3, "bytes": plain_bytes}


def boundaries(tokenizer, problem, answer):
    """Input ids, and the published position of every step: of the empty answer first."""

    def chat(content):
        turns = [{"role": "user", "content": problem}, {"role": "assistant", "content": content}]
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)

    last = []
    for number in range(len(answer) + 1):
        text = chat("\n\n".join(answer[:number])).strip()
        text += "\n\n" if number not in (0, len(answer)) else ""
        last.append(len(tokenizer.encode(text, add_special_tokens=False)) - 2)
    return tokenizer.encode(chat("\n\n".join(answer)), add_special_tokens=False), last


def published(models, tokenizer, problem, steps):
    """PRIME-RL/ImplicitPRM eval/processbench.py."""
    answer = [f"Step {i + 1}: " + step.removeprefix(f"Step {i + 1}: ") for i, step in enumerate(steps)]
    ids, last = boundaries(tokenizer, problem, answer)
    inputs = torch.tensor([ids])
    with torch.no_grad():
        logps = [m(inputs).logits[:, :-1].log_softmax(-1).gather(2, inputs[:, 1:, None])[0, :, 0] for m in models]
    reward = COEF * (logps[0] - logps[1])
    reward[: last[0]] = 0
    return reward.cumsum(-1)[torch.tensor(last[1:]).clamp(0, len(ids) - 2)].tolist()


def so_far(models, tokenizer, problem, steps):
    """What the procedure says of every beginning of the solution when it is the whole answer."""
    return [published(models, tokenizer, problem, steps[: k + 1])[-1] for k in range(len(steps))]


@pytest.fixture(scope="module", params=TOKENIZERS)
def pair(request, tmp_path_factory):
    tokenizer = TOKENIZERS[request.param]()
    size = {"vocab_size": len(tokenizer) + 3, "max_position_embeddings": 512}
    folders = [tmp_path_factory.mktemp(name) for name in ("model", "reference")]
    models = [write_tiny(folder, "llama", seed=i, **size) for i, folder in enumerate(folders)]
    for folder in folders:
        tokenizer.save_pretrained(folder)
    return folders, models, tokenizer


def load(folders, dtype="fp32", **fields):
    return load_verifier(folders[0], "implicit", reference=folders[1], dtype=dtype, kv_bytes=1 << 24, **fields)


def score(verifier, steps, cuts=(), problem=PROBLEM):
    async def main(session):
        at, scores, begin = session.root, [], 0
        for end in (*cuts, len(steps)):
            found = await session.score(at, steps[begin:end])
            if at is not session.root:
                session.release([at])
            at, begin, scores = found.handle, end, scores + found.scores
        session.release([at])
        return scores

    session = verifier.open(problem)
    scores = asyncio.run(main(session))
    cost = session.cost()
    session.close()
    verifier.engine.forget_prompts()
    assert not verifier.engine.verifier_forest._live and verifier.engine.budget.used_bytes == 0
    return scores, cost


def test_scores_equal_the_published_procedure(pair, cpu_extension):
    folders, models, tokenizer = pair
    problems = (PROBLEM, "1 + 1", "a longer one: is the sum of 2 - 3 + 4 equals 3?")
    expected = [so_far(models, tokenizer, problem, STEPS) for problem in problems]
    with load(folders) as verifier:
        for problem, row in zip(problems, expected, strict=True):
            scores, _ = score(verifier, STEPS, problem=problem)
            assert scores == pytest.approx(row, rel=1e-5, abs=1e-5 * COEF * 100)
            assert score(verifier, STEPS, (1, 2), problem)[0] == scores == score(verifier, STEPS, (2,), problem)[0]


def test_bf16_is_as_exact_as_plain_transformers(pair, cpu_extension):
    folders, models, tokenizer = pair
    problems = (PROBLEM, "1 + 1", "is the sum of 2 - 3 + 4 equals 3?", "so?")
    with load(folders, "bf16") as verifier:
        ours = [value for problem in problems for value in score(verifier, STEPS, problem=problem)[0]]

    def plain(dtype):
        cast = [type(m)(m.config).to(dtype).eval() for m in models]
        for copy, model in zip(cast, models, strict=True):
            copy.load_state_dict(model.state_dict())
        return torch.tensor([v for problem in problems for v in so_far(cast, tokenizer, problem, STEPS)], dtype=torch.float64)

    exact, low = plain(torch.float64), plain(torch.bfloat16)
    error, budget = ((x - exact).square().mean().sqrt() for x in (torch.tensor(ours, dtype=torch.float64), low))
    assert error <= 2 * budget, f"bf16 error {error:.2e}, plain transformers' own {budget:.2e}"


@pytest.mark.parametrize(("name", "counted"), [("qwen", 2), ("llama3", 2), ("bytes", 1)])
def test_what_the_published_inner_positions_count_of_the_next_step(name, counted):
    """Why inner values of a longer answer are not ours (docs/verifiers.md): they read into the next step."""
    tokenizer = TOKENIZERS[name]()
    answer = [f"Step {i + 1}: {step}." for i, step in enumerate(["a b", "c", "d e"])]
    ids, last = boundaries(tokenizer, PROBLEM, answer)
    starts = [len(tokenizer.decode(ids[:i])) for i in range(len(ids))]
    for k, position in enumerate(last[1:-1], 1):
        begin = tokenizer.decode(ids).index(answer[k])
        assert sum(starts[i] >= begin for i in range(position + 2)) == counted, "position i is that of token i + 1"


def test_a_random_tree_equals_every_path_alone(pair, cpu_extension):
    folders, models, tokenizer = pair
    draw = random.Random(0)
    paths = {(): None}
    for _ in range(12):
        parent = draw.choice([path for path in paths if len(path) < 3])
        paths[(*parent, f"{draw.choice(STEPS)} {draw.randrange(9)}")] = None

    async def grow(session):
        handles, scores = {(): session.root}, {}

        async def below(path):
            children = [p for p in paths if p[:-1] == path and len(p) == len(path) + 1]
            found = await asyncio.gather(*(session.score(handles[path], [child[-1]]) for child in children))
            for child, scored in zip(children, found, strict=True):
                handles[child], scores[child] = scored.handle, scored.scores[0]
            await asyncio.gather(*map(below, children))

        await below(())
        session.release([handle for path, handle in handles.items() if path])
        return scores

    with load(folders) as verifier:
        session = verifier.open(PROBLEM)
        scores = asyncio.run(grow(session))
        session.close()
        alone = {path: score(verifier, list(path))[0][-1] for path in scores}
        verifier.engine.forget_prompts()
        assert not verifier.engine.verifier_forest._live
    assert scores == alone
    longest = max(scores, key=len)
    assert scores[longest] == pytest.approx(published(models, tokenizer, PROBLEM, longest)[-1], rel=1e-5, abs=1e-6)


def test_every_token_is_computed_once_and_its_predecessor_read_again(cpu_extension, tmp_path):
    tokenizer = plain_bytes()
    folders = [tmp_path / name for name in ("model", "reference")]
    for i, folder in enumerate(folders):
        write_tiny(folder, "llama", seed=i, vocab_size=len(tokenizer), max_position_embeddings=512)
        tokenizer.save_pretrained(folder)
    text = TextVerifier(tokenizer, FAMILIES["implicit"])
    chain = list(text.extend(text.extend(text.extend(text.start("q"), STEPS[:1]).path, STEPS[1:2]).path, STEPS[2:]).path.ids)
    with load(folders) as verifier:
        _, cost = score(verifier, STEPS)
        assert verifier.engine.verifier_forest.pool.layers == 2 * 2, "one pool with the layers of both"
        session = verifier.open("q")

        async def siblings():
            first = await session.score(session.root, STEPS[:1])
            before = session.cost().tokens_recomputed
            await asyncio.gather(*(session.score(first.handle, [f"{i}{step}" for step in STEPS[1:2]]) for i in range(4)))
            return before

        before = asyncio.run(siblings())
        assert before == 0 and session.cost().tokens_recomputed <= 4
        session.close()
    assert cost.tokens_prefilled == len(chain) + len(PROBLEM) - 1 and cost.tokens_recomputed == 2


def test_a_step_without_text_and_one_too_long(pair):
    folders, _, _ = pair
    with load(folders) as verifier:
        session = verifier.open(PROBLEM)

        async def main():
            first = await session.score(session.root, ["a", " "])
            blank = await session.score(first.handle, ["\n"])
            return first, blank, await session.score(blank.handle, ["x " * 600]), await session.score(blank.handle, ["b"])

        first, blank, long, last = asyncio.run(main())
        session.close()
    assert first.scores[1] is None and blank.scores == [None]
    assert blank.running.count == 1 and blank.running.last == first.running.last
    assert long.handle is None and "this verifier reads at most 512" in long.refused
    assert last.running.count == 2 and last.running.last == pytest.approx(last.scores[0])
    with load(folders, max_length=64) as verifier:
        assert verifier.text.max_length == 64


def test_beta_is_data(pair):
    folders, _, _ = pair
    with load(folders) as small, load(folders, scale=0.05) as large:
        assert score(large, STEPS)[0] == pytest.approx([50 * s for s in score(small, STEPS)[0]])


def test_a_pair_needs_its_reference(pair):
    folders, _, _ = pair
    with pytest.raises(ValueError, match="PRM family 'implicit' compares two models; pass as reference the model that .* was"):
        load_verifier(folders[0], "implicit")
    with pytest.raises(ValueError, match="reference must be None for PRM family 'llemma', which is one model"):
        load_verifier(folders[0], "llemma", reference=folders[1])
