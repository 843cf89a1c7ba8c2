"""All strategies over real (random) transformers models: prompts, stops and scores fit together."""

import pytest
import torch
from plain_policy import PlainBackend
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification, PreTrainedTokenizerFast
from ttsearch import STRATEGIES, Budget, Problem, solve, solve_many
from ttsearch.prompts import TextPolicy
from ttsearch.protocols import Backend, Policy
from ttsearch.tree import walk
from ttsearch.verifiers import FAMILIES, TextVerifier

SMALL = dict(n=8, width=4, max_steps=5, max_tokens=60, max_step_tokens=25, temperature=1.0)


@pytest.fixture(scope="module")
def backend():
    tokens = ["<pad>", "<eos>", "<unk>", "\n\n", "\\boxed{", "}", *"0123456789+-=:;?ab"]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n\n|\\boxed\{|[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
        initializer_range=0.2, num_labels=2,
    )  # fmt: skip
    return PlainBackend(
        LlamaForCausalLM(config).eval(),
        TextPolicy(tokenizer, "plain", [tokenizer.eos_token_id], len(tokens)),
        LlamaForTokenClassification(config).eval(),
        TextVerifier(tokenizer, FAMILIES["trl-blank-line"], 128),
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_search(backend, strategy):
    result = solve("1+1?", backend=backend, strategy=strategy, **SMALL)
    assert len(result.candidates) == {"greedy": 1, "dvts": 2}.get(strategy, 8)
    nodes = [node for node in walk(result.root) if node is not result.root]
    assert all(node.released and node.num_tokens for node in nodes)
    for node in nodes:
        assert (node.finish_reason == "step") == (not node.finished)
        assert (node.finish_reason == "step") <= node.text.endswith("\n\n")
        assert "\n\n" not in node.text.strip()
        assert (node.finish_reason == "boxed") <= node.text.endswith("}")
    assert result.to_dict()["candidates"]


def test_same_seed_same_tree(backend):
    def tree(seed):
        root = solve("1+1?", backend=backend, seed=seed, **SMALL).root
        return [(node.path_key, node.text, node.step_score) for node in walk(root)]

    assert tree(0) == tree(0) != tree(1)


def test_incremental_layout_equals_the_whole_text(backend):
    """Scores kept with the nodes are those of one pass over the finished solution."""
    result = solve("1+1?", backend=backend, strategy="best_of_n", **SMALL)
    verifier = backend.prm_text
    for candidate in result.candidates:
        new = verifier.extend(verifier.start("1+1?"), [step.text for step in candidate.path()])
        with torch.inference_mode():
            probabilities = backend.prm(torch.tensor([new.path.ids])).logits[0].float().softmax(-1)
        good = probabilities[[new.keep + r for r in new.reads], 1]
        torch.testing.assert_close(torch.tensor(candidate.step_scores()), good, atol=1e-5, rtol=0)


def test_many_problems(backend):
    problems = [Problem(f"{i}+1?", str(i + 1)) for i in range(3)]
    budget = Budget(**SMALL, aggregate="product", vote="weighted")
    records = solve_many(problems, backend, "beam_search", budget)
    alone = [solve_many([problem], backend, "beam_search", budget)[0] for problem in problems]
    assert [r["candidates"] for r in records] == [r["candidates"] for r in alone]


def test_protocols(backend):
    assert isinstance(backend, Backend)
    assert isinstance(backend.open(Problem("1?"), Budget(1)), Policy)
