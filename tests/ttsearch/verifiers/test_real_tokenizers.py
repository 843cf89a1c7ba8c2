"""The published token ids, and ids and positions of the published procedures, on the real tokenizers."""

import json

import pytest
import torch
from prm_reference import REFERENCES
from real_tokenizers import real_tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from ttsearch.verifiers import FAMILIES, TextVerifier

FAMILIES_OF = {
    "mistral": ("math-shepherd", "mathminos"),
    "llama3": ("rlhflow-mistral", "rlhflow-deepseek", "er-prm", "versaprm"),
    "qwen": ("skywork", "qwen-math-prm", "math-psa", "versaprm-qwen", "trl", "pure"),
}
CASES = [(name, family) for name, families in FAMILIES_OF.items() for family in families]
PROBLEM = "Janet’s ducks lay 16 eggs per day. She eats 3 for breakfast & sells the rest at $2 each: how much a day?"
STEPS = [
    "Step 1: Janet eats 3 eggs, so 16 - 3 = 13 eggs are left.",
    "## Step 2:\nShe sells them: $13 \\times 2 = 26$",
    "(26) is what she makes…",
    "The answer is \\(\\boxed{26}\\)",
]


class NoModel:
    """Only ids and positions count."""

    def logits(self, ids):
        return torch.zeros(1).expand(len(ids), 200_000)


@pytest.mark.parametrize(("name", "family"), CASES)
def test_published_ids_hold(name, family):
    tokenizer, family = real_tokenizer(name), FAMILIES[family]
    assert family.vocab is None or family.vocab == tokenizer.vocab_size, "the check of `ids` applies"
    TextVerifier(tokenizer, family)
    for text, published in family.ids.items():
        assert tokenizer.encode(text, add_special_tokens=False)[-1] == published


def test_heads_are_those_rows():
    rows = {family: TextVerifier(real_tokenizer(name), FAMILIES[family]).head.rows for name, family in CASES}
    assert rows["math-shepherd"] == (648, 387) and rows["rlhflow-mistral"] == (10, 12) and rows["versaprm"] == (12, 10)
    assert rows["math-psa"] == (488, 481) and rows["er-prm"] == (489, 482) and rows["versaprm-qwen"] == (12, 10)


def test_another_id_of_qwens_step_token_is_taken():
    """151651 is published; no package was found whose tokenizer has the added tokens, so nothing rests on that id."""
    published, family = real_tokenizer("qwen"), FAMILIES["qwen-math-prm"]
    assert published.encode("<extra_0>") == [151651]
    content = json.loads(published.backend_tokenizer.to_str())
    names = {"<extra_0>": "<|vision_start|>", "<|vision_start|>": "<extra_0>"}
    for token in content["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    swapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    swapped.chat_template = published.chat_template
    verifier = TextVerifier(swapped, family)
    new = verifier.extend(verifier.start(PROBLEM), STEPS)
    assert swapped.vocab_size == 151643 and [new.ids[read] for read in new.reads] == [151652] * len(STEPS)
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<extra_0>"]
    without = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    without.chat_template = published.chat_template
    with pytest.raises(ValueError, match="needs '<extra_0>' to be 1 token of its own, which it is not here"):
        TextVerifier(without, family)


@pytest.mark.parametrize(("name", "family"), CASES)
def test_ids_and_positions(name, family):
    tokenizer = real_tokenizer(name)
    verifier = TextVerifier(tokenizer, FAMILIES[family])
    path, rolled_back = verifier.start(PROBLEM), 0
    for count in range(1, len(STEPS) + 1):
        new = verifier.extend(path, STEPS[count - 1 : count])
        rolled_back += len(path.ids) - new.keep
        path = new.path
        published = REFERENCES[family](NoModel(), tokenizer, PROBLEM, STEPS[:count])
        end = published.positions[-1] + 1
        assert list(path.ids[:end]) == published.ids[:end]
        assert new.keep + new.reads[-1] == published.positions[-1]
    assert rolled_back == 0, "no published marker changes when the next step comes"
    new = verifier.extend(verifier.start(PROBLEM), STEPS)
    assert [new.keep + read for read in new.reads] == published.positions


@pytest.mark.parametrize(("name", "family"), CASES)
@pytest.mark.parametrize("steps", [["Первый шаг.", "значит 4.", "x", "итог 4."], ["ки", "ки"], ["a.", "é", "我 b", "илл"]])
def test_a_step_is_read_in_the_text_that_ends_with_it(name, family, steps):
    """ER-PRM writes nothing between " ки" and the next step, and Llama 3 has tokens for both together."""
    verifier = TextVerifier(real_tokenizer(name), FAMILIES[family])
    at, read = verifier.start("Сколько будет 2+2?"), []
    while len(at.steps) < len(steps):
        new = verifier.extend(at, steps[len(at.steps) :])
        at = new.path
        read += [at.ids[: new.keep + end + 1] for end in new.reads]
    path = verifier.start("Сколько будет 2+2?")
    for step, ids in zip(steps, read, strict=True):
        new = verifier.extend(path, [step])
        path = new.path
        assert ids == path.ids[: new.keep + new.reads[-1] + 1]
