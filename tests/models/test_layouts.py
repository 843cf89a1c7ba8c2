"""Every family's checkpoint layout, loaded here and compared with plain transformers and the head written out."""

import pytest
import torch
from prm_checkpoints import (
    edit_json,
    to_bin,
    write_causal_lm,
    write_math_psa,
    write_pqm,
    write_qwen_prm,
    write_reason_eval,
    write_reward_head,
    write_skywork,
    write_token_classifier,
)
from tiny_models import config_of, rewrite
from trees import Tree

from ttskernels import available
from ttskernels.models import HeadSpec, load_checkpoint, load_model
from ttskernels.models.layouts import HEAD_KINDS, REFUSED, head_kind
from ttskernels.ops.step_score import step_score

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]


def scores(folder, impl="reference", **options):
    """Score of every token of IDS by the loaded model."""
    model = load_model(folder, torch.float32, impl, **options)
    tree, head = Tree(model), model.head
    hidden = tree.run([tree.forest.add(None, IDS)], output="hidden")
    return step_score(
        hidden, torch.arange(len(IDS), dtype=torch.int32), head.weight, bias=head.bias, norm_weight=model.norm,
        eps=model.config.rms_eps, inner_weight=head.inner_weight, inner_bias=head.inner_bias, squash=head.squash,
        mix=head.mix, impl=impl,
    )  # fmt: skip


def softmax(row, columns=slice(None)):
    return lambda logits: logits[:, columns].softmax(-1)[:, row]


def difference(logits):
    p = logits.softmax(-1)
    return p[:, 1] - p[:, 0]


# family -> (builder, variant, changes to its config, head, logits of the plain model -> score); head None: its own
CASES = {
    "math-shepherd": (write_causal_lm, "mistral_full", {}, HeadSpec((64, 38), mix=(1, 0)), softmax(0, [64, 38])),
    "rlhflow": (write_causal_lm, "llama_rope3_bias", {}, HeadSpec((10, 12), mix=(1, 0)), softmax(0, [10, 12])),
    "er-prm": (write_causal_lm, "llama", {}, HeadSpec((7, 9), mix=(1, 0)), softmax(0, [7, 9])),
    "versaprm": (write_causal_lm, "qwen2", {}, HeadSpec((12, 10), mix=(0, 1)), softmax(1, [12, 10])),
    "llemma": (
        write_causal_lm,
        "llama",
        {},
        HeadSpec(vocab_mean=True, squash="sigmoid"),
        lambda logits: logits.mean(-1).sigmoid(),
    ),
    "skywork": (write_skywork, "qwen2", {}, None, lambda logits: logits[:, 0].sigmoid()),
    "skywork tied": (write_skywork, "qwen2_window", {}, None, lambda logits: logits[:, 0].sigmoid()),
    "qwen": (write_qwen_prm, "qwen2", {}, None, softmax(1)),
    "trl": (write_token_classifier, "qwen2_window", {"num_labels": 2}, None, softmax(1)),
    "pure": (write_token_classifier, "qwen2", {"num_labels": 2}, HeadSpec(mix=(-1, 1)), difference),
    "mathminos": (write_token_classifier, "mistral_full", {"num_labels": 1}, None, lambda logits: logits[:, 0]),
    "no bias": (
        write_token_classifier,
        "mistral_full",
        {"num_labels": 1, "token_classification_bias": False},
        None,
        lambda logits: logits[:, 0],
    ),
    "pqm": (write_pqm, "llama", {}, None, lambda logits: logits[:, 0]),
    "reasoneval-7b": (write_reason_eval, "mistral_window", {}, None, lambda logits: 1 - softmax(0)(logits)),
    "reasoneval-34b": (write_reason_eval, "llama", {}, None, lambda logits: 1 - softmax(0)(logits)),
    "with a bias": (write_reason_eval, "llama", {"bias": True}, HeadSpec(mix=(0, 1, 0)), softmax(1)),
    "math-psa": (write_math_psa, "qwen2", {}, HeadSpec((48, 81), mix=(1, 0)), softmax(0, [48, 81])),
    "reasonflux-1.5b": (write_reward_head, "qwen2", {}, None, lambda logits: logits[:, 0].sigmoid()),
}


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("family", CASES)
def test_family(family, impl, tmp_path):
    if reason := available(impl):
        pytest.skip(reason)
    write, variant, changes, head, score = CASES[family]
    plain = write(tmp_path, config_of(variant, **changes))
    base = tmp_path / "base" if write is write_pqm else None
    expected = score(plain.logits(torch.tensor([IDS]))[0])
    torch.testing.assert_close(scores(tmp_path, impl, head=head, base=base), expected, rtol=1e-5, atol=2e-5)
    assert expected.std() > 1e-3  # scores that do not differ would prove nothing
    assert load_model(tmp_path, torch.float32, "reference", head, base=base).lm_head is None


@pytest.mark.parametrize("shards", [1, 3])
def test_bin_files(tmp_path, shards):
    """Math-Shepherd and Llemma are published as (sharded) pytorch_model.bin."""
    write_causal_lm(tmp_path, config_of("mistral_full"))
    before = load_checkpoint(tmp_path, torch.float32)
    to_bin(tmp_path, shards)
    after = load_checkpoint(tmp_path, torch.float32)
    assert before.weights.keys() == after.weights.keys()
    assert all(torch.equal(after.weights[name], tensor) for name, tensor in before.weights.items())


def test_padded_vocabulary(tmp_path):
    """More embedding rows than the tokenizer has tokens, as Qwen pads them."""
    plain = write_causal_lm(tmp_path, config_of("qwen2", vocab_size=160))
    expected = plain.logits(torch.tensor([IDS]))[0].mean(-1).sigmoid()
    actual = scores(tmp_path, head=HeadSpec(vocab_mean=True, squash="sigmoid"))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_value_head_is_squashed_by_its_family_alone(tmp_path):
    """Skywork and PQM have the same weights; config.json or the caller says which it is."""
    plain = write_skywork(tmp_path, config_of("qwen2"))
    value = plain.logits(torch.tensor([IDS]))[0, :, 0]
    torch.testing.assert_close(scores(tmp_path, head=HeadSpec(squash="none")), value, rtol=1e-5, atol=2e-5)
    edit_json(tmp_path / "config.json", architectures=["Qwen2ForCausalLM"])
    torch.testing.assert_close(scores(tmp_path), value, rtol=1e-5, atol=2e-5)


def test_missing_head_is_never_random(tmp_path):
    for number, kind in enumerate(HEAD_KINDS):
        raw = {"architectures": [(kind.architectures or ("LlamaForCausalLM",))[0].replace("*", "Qwen2")]}
        raw |= dict.fromkeys(kind.bias_entries, True)
        assert head_kind(raw, kind.names(raw)) is kind, number
        for name in kind.names(raw):
            if kind.architectures or name != kind.weight:  # without, only the weight's name tells that there is a head
                with pytest.raises(ValueError, match=f"must hold {name} "):
                    head_kind(raw, set(kind.names(raw)) - {name})


def test_missing_bias(tmp_path):
    write_token_classifier(tmp_path, config_of("qwen2", num_labels=2))
    rewrite(tmp_path, lambda t: t.pop("score.bias"))
    with pytest.raises(ValueError, match="Qwen2ForTokenClassification checkpoint must hold score.bias .token class"):
        load_checkpoint(tmp_path)
    edit_json(tmp_path / "config.json", token_classification_bias=False)
    assert load_checkpoint(tmp_path).head.bias is None


def test_bias_that_config_denies(tmp_path):
    write_reason_eval(tmp_path, config_of("llama", bias=True))
    edit_json(tmp_path / "config.json", bias=False)
    with pytest.raises(ValueError, match="holds score_head.bias, which this decoder would not use"):
        load_checkpoint(tmp_path)


def test_wrong_head_shape(tmp_path):
    write_token_classifier(tmp_path, config_of("qwen2", num_labels=2))
    rewrite(tmp_path, lambda t: t.update({"score.weight": t["score.weight"][:, :100].clone()}))
    with pytest.raises(ValueError, match=r"score.weight must have shape \(2, 448\), got \(2, 100\)"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("architecture", ["LlamaModel", "LlamaForSequenceClassification", "Qwen2ForEnsemblePRM"])
def test_unknown_architecture(architecture):
    with pytest.raises(ValueError, match=f"architectures must name a .*ForCausalLM or one of .*, got '{architecture}'"):
        head_kind({"architectures": [architecture]}, ["model.norm.weight", "score.weight"])


def test_labels_without_a_meaning(tmp_path):
    write_token_classifier(tmp_path, config_of("qwen2", num_labels=3))
    with pytest.raises(ValueError, match="head must be a HeadSpec whose mix says what each of the 3 labels of score.w"):
        load_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"mix must have a number for each of 3 labels, got \(0, 1\)"):
        load_checkpoint(tmp_path, head=HeadSpec(mix=(0, 1)))
    with pytest.raises(ValueError, match="keep_lm_head must be false for .*: it has a token classifier"):
        load_checkpoint(tmp_path, keep_lm_head=True)
    with pytest.raises(ValueError, match="the checkpoint has a token classifier, not a plain language model"):
        load_checkpoint(tmp_path, head=HeadSpec(rows=(1, 2), mix=(0, 1)))


def test_weights_without_config(tmp_path):
    plain = write_pqm(tmp_path, config_of("llama"))
    assert load_checkpoint(tmp_path, base=tmp_path / "base").config.vocab == len(plain.trunk.embed_tokens.weight)
    with pytest.raises(FileNotFoundError, match="holds weights but no config.json; copy it .* or pass as base"):
        load_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="base must hold a config.json, got .*empty without"):
        (tmp_path / "empty").mkdir()
        load_checkpoint(tmp_path, base=tmp_path / "empty")
    (tmp_path / "base" / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(
        ValueError, match="embed_tokens.weight must have shape .*; for added tokens set vocab_size to 131"
    ):
        load_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="base must be None for .*, which is a whole checkpoint"):
        load_checkpoint(tmp_path, base=tmp_path / "base")


@pytest.mark.parametrize(
    "called, name",
    [
        ("ReasonFlux-PRM-7B", "ReasonFlux-PRM-7B"),
        ("models--Gen-Verse--ReasonFlux-PRM-7B/snapshots/4fe1", "ReasonFlux-PRM-7B"),
        ("Llama-3.1-8B-PRM800k-r", "Babelscape's PDDL PRMs"),
        ("Babelscape/some-PRM", "Babelscape's PDDL PRMs"),
    ],
)
def test_refused_by_name(called, name, tmp_path):
    folder = tmp_path / called
    write_qwen_prm(folder, config_of("qwen2"))
    with pytest.raises(ValueError, match=rf"{name} \(.*\) is not supported: .*add a HeadKind"):
        load_checkpoint(folder)
    plain = folder.rename(tmp_path / "renamed")
    load_checkpoint(plain)
    edit_json(plain / "config.json", _name_or_path=called)
    if "snapshots" not in called:
        with pytest.raises(ValueError, match=name):
            load_checkpoint(plain)


@pytest.mark.parametrize("called", ["ReasonFlux-PRM-1.5B", "ReasonFlux-PRM-Qwen-2.5-7B", "Llama-3.1-8B-PRM800k"])
def test_not_refused(called, tmp_path):
    write_reward_head(tmp_path / called, config_of("qwen2"))
    load_checkpoint(tmp_path / called)
    assert all(refusal.names == tuple(map(str.lower, refusal.names)) for refusal in REFUSED)
