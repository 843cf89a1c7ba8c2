"""A real model: greedy text in float32 equals transformers'."""

import pytest
import torch
from smollm2 import model_folder
from transformers import AutoModelForCausalLM, AutoTokenizer
from trees import Tree

from ttskernels import available
from ttskernels.models import load_model

QUESTIONS = (
    "What is 2+2?",
    "Name three colours.",
    "Solve step by step: a shop sells 4 apples for $3. How much do 12 apples cost?",
    "Write a haiku about the sea.",
    "Why is the sky blue? Answer in one sentence.",
)


@pytest.fixture(scope="module")
def prompts():
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [
        tokenizer(t).input_ids
        for t in tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    ]


def greedy(model, prompts, new_tokens):
    """All prompts in one batch: a prefill of everything but the last ids, then one decode call."""
    common = next(i for i, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1)
    tree = Tree(model, num_pages=80)
    root = tree.forest.add(None, prompts[0][:common])  # the system prompt, once
    bodies = [tree.forest.add(root, prompt[common:-1]) for prompt in prompts]
    tree.run([root, *bodies], out=[0])
    leaves = [tree.forest.add(body, prompt[-1:]) for body, prompt in zip(bodies, prompts, strict=True)]
    tree.forest.reserve(leaves, new_tokens)
    rows = len(prompts)
    tokens = torch.zeros(new_tokens, rows, dtype=torch.int32)
    done = model.decode(
        torch.tensor([prompt[-1] for prompt in prompts], dtype=torch.int32),
        tree.plan([(leaf, 0, 1) for leaf in leaves]),
        tree.pool,
        keys=torch.arange(rows),
        params=torch.tensor([[0.0, 0, 1, 0]]).repeat(rows, 1),
        next_state=torch.zeros(1, model.config.vocab, dtype=torch.int32),
        states=torch.zeros(rows, dtype=torch.int32),
        tokens=tokens,
        logprobs=torch.zeros(new_tokens, rows),
    )
    assert done == new_tokens
    return [until_end(column.tolist(), model.config.eos_ids) for column in tokens.T]


def until_end(ids, eos):
    return next((ids[: i + 1] for i, token in enumerate(ids) if token in eos), ids)


@pytest.mark.slow
@pytest.mark.parametrize(
    "impl, new_tokens", [("reference", 6), ("cpu", 64)]
)  # the reference takes seconds a token
def test_greedy_text(impl, new_tokens, prompts):
    """Every token is transformers' argmax after the same prefix, so by induction the texts are equal."""
    if reason := available(impl):
        pytest.skip(reason)
    texts = greedy(load_model(model_folder(), torch.float32, impl), prompts, new_tokens)
    theirs = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)
    for prompt, text in zip(prompts, texts, strict=True):
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt + text[:-1]])).logits[0, len(prompt) - 1 :]
        assert text == logits.argmax(-1).tolist()
