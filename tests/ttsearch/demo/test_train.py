"""The recipe end to end at a toy size, stopped and resumed; the sampler against transformers."""

import dataclasses
import json

import pytest
import torch
from ttsearch.demo import batches, learn, train
from ttsearch.demo.sample import CachedDecoder, sample
from ttsearch.demo.sizes import RECIPES
from ttsearch.demo.tokenizer import build_tokenizer

TOY = dataclasses.replace(
    RECIPES["small"],
    layers=1,
    batch_tokens=300,
    policy_updates=6,
    trunk_updates=4,
    verifier_updates=4,
    finetune_updates=3,
    check_every=3,
    check_below_loss=9.0,
    rollout_problems=2,
    rollouts_per_problem=2,
    dev_per_level=1,
    report_per_level=1,
    report_samples=2,
)


def test_recipe_runs_and_skips_finished_stages(tmp_path, capsys, monkeypatch):
    report = train.train(TOY, seed=0, out=tmp_path)
    assert report["problems"] == 5 and report["samples"] == 2
    assert json.loads((tmp_path / "policy.json").read_text())["update"] in (3, 6)
    config = json.loads((tmp_path / "verifier" / "config.json").read_text())
    assert (config["head_dim"], config["architectures"]) == (64, ["LlamaForTokenClassification"])
    assert (tmp_path / "rollouts.jsonl").read_text().count("\n") == 4

    def no_training(*args, **kwargs):
        raise AssertionError("a finished stage ran again")

    monkeypatch.setattr(train, "learn", no_training)
    monkeypatch.setattr(train, "sample", no_training)
    assert train.train(TOY, seed=0, out=tmp_path) == report


def run_learning(out, updates, model):
    learn.learn(
        "toy",
        model,
        learn.make_optimizer(model, 1e-3),
        batches.EndlessBatches(0.2, 300, build_tokenizer(), "resume"),
        updates=updates,
        learning_rate=learn.warm_up(1e-3, 4),
        label_weight=1.0,
        checkpoint=out,
    )
    return model.state_dict()


def test_interrupted_learning_ends_where_unbroken_learning_does(tmp_path):
    torch.manual_seed(0)
    first = train.new_model(TOY)
    start = {name: value.clone() for name, value in first.state_dict().items()}
    unbroken = run_learning(tmp_path / "a.pt", 25, first)
    second = train.new_model(TOY)
    second.load_state_dict(start)
    run_learning(tmp_path / "b.pt", 11, second)
    resumed = run_learning(tmp_path / "b.pt", 25, train.new_model(TOY))
    for name, value in unbroken.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0)


def test_half_written_rollouts_are_sampled_again(tmp_path):
    train.train(TOY, seed=0, out=tmp_path)
    path = tmp_path / "rollouts.jsonl"
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    train.rollout_stage(TOY, build_tokenizer(), seed=0, out=tmp_path)
    assert path.read_text() == whole


@pytest.mark.parametrize("size", ["small", "base"])
def test_cached_decoder_agrees_with_transformers(size):
    torch.manual_seed(0)
    policy = train.as_policy(train.new_model(RECIPES[size]), RECIPES[size])
    ids = torch.randint(3, 30, (3, 20))
    decoder = CachedDecoder(policy, rows=3, capacity=20)
    with torch.inference_mode():
        logits = decoder(ids[:, :7])
        for i in range(7, 20):
            logits = decoder(ids[:, i : i + 1])
        torch.testing.assert_close(logits, policy(ids).logits[:, -1], rtol=1e-4, atol=1e-5)


def test_sampling_is_seeded():
    torch.manual_seed(0)
    policy, tokenizer = train.as_policy(train.new_model(TOY), TOY), build_tokenizer()
    prompts = ["2;a+57?"] * 2 + ["12;a+57;b-3?"]
    texts = sample(policy, tokenizer, prompts, seed=4)
    assert texts == sample(policy, tokenizer, prompts, seed=4) and texts[0] != texts[1]
