"""`generate` of transformers over our engine, and searches with models that only transformers knows."""

import pytest
import torch
from chat_models import chat_tokenizer
from general_models import general_tiny
from tiny_models import write_tiny
from ttsearch.solve import solve

from ttskernels.integrations.transformers import TreeGenerate, as_model

PROMPTS = [[3, 9, 11, 24, 90, 17], [33, 2, 8], [44, 61, 70, 15, 19, 77, 101, 6]]


def batch(prompts=PROMPTS):
    """Left-padded ids and their mask, as a tokenizer gives them."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(params=["llama", "gemma2"])
def hf(request, tmp_path):
    model = write_tiny(tmp_path, "llama") if request.param == "llama" else general_tiny("gemma2")
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture
def tree(hf):
    tree = TreeGenerate(hf, kv_bytes=1 << 26)
    yield tree
    tree.close()


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1], [PROMPTS[0], PROMPTS[1], PROMPTS[0]]])
def test_greedy_ids_are_generates_own(hf, prompts):
    expected = hf.generate(**batch(prompts), max_new_tokens=17, do_sample=False)
    tree = TreeGenerate(hf)
    assert torch.equal(hf.generate(**batch(prompts), max_new_tokens=17, do_sample=False, custom_generate=tree), expected)
    tree.close()
    assert torch.equal(hf.generate(**batch(prompts), max_new_tokens=17, do_sample=False), expected)  # by itself again


def test_samples_share_their_prompt_and_repeat_with_the_seed(hf, tree, monkeypatch):
    rows, forward = [], tree.model.forward
    monkeypatch.setattr(tree.model, "forward", lambda ids, *args, **kw: rows.append(len(ids)) or forward(ids, *args, **kw))
    options = dict(do_sample=True, temperature=0.9, top_p=0.95, num_return_sequences=5, max_new_tokens=7, custom_generate=tree)
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(hf.generate(**batch(), **options))
        assert sum(rows) - sum(map(len, PROMPTS)) < 6 * 15, "a prompt was computed more than once"
        rows.clear()
    assert made[0].shape[0] == 15 and torch.equal(made[0], made[1])
    assert made[0].shape != made[2].shape or not torch.equal(made[0], made[2])
    assert len({tuple(row.tolist()) for row in made[0]}) > 10
    assert torch.equal(made[0][:, :8], batch()["input_ids"].repeat_interleave(5, 0))


def test_samples_have_generates_distribution(hf, tree):
    """First tokens of 4,000 samples at temperature 1.5 and top_k 8, against the exact probabilities: chi-squared."""
    ids = torch.tensor([PROMPTS[0]])
    options = dict(do_sample=True, temperature=1.5, top_k=8, top_p=1.0, num_return_sequences=4000, max_new_tokens=1)
    if tree.model.config.model_type == "gemma2":
        hf.set_attn_implementation("eager")
    top, index = (hf(ids).logits[0, -1] / 1.5).topk(8)
    if tree.model.config.model_type == "gemma2":
        hf.set_attn_implementation("ttsk_tree")
    drawn = hf.generate(ids, **options, custom_generate=tree)[:, -1]
    counts = (drawn[:, None] == index).sum(0)
    assert counts.sum() == 4000
    expected = 4000 * top.softmax(0)
    assert ((counts - expected) ** 2 / expected).sum() < 40  # 7 degrees of freedom: 24 in one of a thousand


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_beams": 2}, "num_beams must be 1 and return_dict_in_generate off, .* got 2 and False"),
        ({"return_dict_in_generate": True}, "got 1 and True"),
        ({"repetition_penalty": 1.3}, "TreeGenerate has no RepetitionPenaltyLogitsProcessor; leave"),
        ({"max_time": 5.0}, "TreeGenerate has no MaxTimeCriteria"),
        ({"eos_token_id": 9}, r"eos_token_id must be the model's own \(7,\), got 9"),
    ],
)
def test_options_that_it_does_not_have_are_refused(hf, tree, options, message):
    with pytest.raises(ValueError, match=message):
        hf.generate(**batch(), max_new_tokens=3, custom_generate=tree, **options)


def test_weights_of_another_moment_or_model_are_refused(hf, tree):
    with pytest.raises(ValueError, match="the one that this TreeGenerate was made for"):
        other = general_tiny("olmo2")
        other.generate(**batch(), max_new_tokens=3, custom_generate=tree)
    with torch.no_grad():
        hf.get_input_embeddings().weight.mul_(1.5)
    with pytest.raises(ValueError, match="weights have changed since this TreeGenerate was made; make another one"):
        hf.generate(**batch(), max_new_tokens=3, custom_generate=tree)


def test_a_prompt_too_long_for_the_memory_is_refused_and_the_next_call_works(hf):
    tree = TreeGenerate(hf, kv_bytes=1 << 16)
    with pytest.raises(ValueError, match="kv_bytes: one path of 198 tokens needs"):
        hf.generate(torch.arange(8, 106)[None], max_new_tokens=100, custom_generate=tree)
    assert hf.generate(torch.tensor([PROMPTS[1]]), max_new_tokens=3, custom_generate=tree).shape[1] <= 6
    tree.close()


def test_wrong_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match="impl must be one of .*got 'fast'"):
        as_model(write_tiny(tmp_path, "llama"), impl="fast")
    with pytest.raises(ValueError, match="model_type must be one of llama, .* got 'gemma2'"):
        as_model(general_tiny("gemma2"), general=False)
    with pytest.raises(ValueError, match='weights must be "auto" or "float" for a model that runs by its own modules'):
        as_model(general_tiny("gemma2"), weights="int8")
    with pytest.raises(ValueError, match="a policy must have a vocabulary head, got a Gemma2Model"):
        as_model(general_tiny("gemma2").model)


@pytest.mark.parametrize("strategy", ["best_of_n", "beam_search"])
def test_a_search_with_a_family_that_only_transformers_knows(strategy, tmp_path):
    tokenizer = chat_tokenizer()
    sizes = dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, max_position_embeddings=512)
    general_tiny("gemma2", **sizes).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options = dict(
        policy=tmp_path, verifier="likelihood", strategy=strategy, n=4, max_tokens=40, temperature=1.0,
        backend_options={"dtype": "fp32"},
    )  # fmt: skip
    first, again = (solve("What is 1 + 1?", **options) for _ in range(2))
    assert len(first.candidates) == 4 and all(path.path_text() for path in first.candidates)
    assert [p.path_text() for p in first.candidates] == [p.path_text() for p in again.candidates]
    assert first.cost.policy.tokens_reused > 0 and first.cost.policy.flops > 0
