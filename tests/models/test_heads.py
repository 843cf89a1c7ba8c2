import json

import pytest
import torch
from tiny_models import rewrite, write_tiny

from ttskernels.models.heads import HEAD_KINDS, HeadSpec, ScoreHead, head_kind
from ttskernels.models.loading import load_checkpoint
from ttskernels.models.model import load_model


def apply(head: ScoreHead, hidden):
    """Scores of `hidden` (after the final norm), written out."""
    if head.inner_weight is not None:
        hidden = torch.relu(hidden @ head.inner_weight.T + head.inner_bias)
    logits = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    squash = {"softmax": lambda x: x.softmax(-1), "sigmoid": torch.sigmoid, "none": lambda x: x}[head.squash]
    return squash(logits) @ (torch.ones(1) if head.mix is None else head.mix)


def rename_architecture(folder, name):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": [name]}))


@pytest.mark.parametrize(
    "labels, spec, expected",
    [
        (1, None, lambda logits: logits[:, 0]),
        (1, HeadSpec(squash="sigmoid"), lambda logits: logits[:, 0].sigmoid()),
        (2, None, lambda logits: logits.softmax(-1)[:, 1]),
        (2, HeadSpec(mix=(-1, 1)), lambda logits: logits.softmax(-1)[:, 1] - logits.softmax(-1)[:, 0]),
        (3, HeadSpec(mix=(0, 1, 1)), lambda logits: 1 - logits.softmax(-1)[:, 0]),
    ],
)
def test_token_classifier(tmp_path, labels, spec, expected):
    model = write_tiny(tmp_path, "qwen2", kind="ForTokenClassification", num_labels=labels)
    checkpoint = load_checkpoint(tmp_path, head=spec)
    head = checkpoint.head
    ids = torch.randint(0, 131, (1, 9))
    with torch.no_grad():
        logits = model(ids).logits[0]
        hidden = model.model(ids).last_hidden_state[0]
    torch.testing.assert_close(apply(head, hidden), expected(logits))
    assert head.weight.dtype == torch.float32 and "lm_head.weight" not in checkpoint.weights


def test_labels_without_a_meaning(tmp_path):
    write_tiny(tmp_path, "qwen2", kind="ForTokenClassification", num_labels=3)
    with pytest.raises(ValueError, match="head must be a HeadSpec whose mix says what each of the 3 labels of score.w"):
        load_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"mix must have a number for each of 3 labels, got \(0, 1\)"):
        load_checkpoint(tmp_path, head=HeadSpec(mix=(0, 1)))
    with pytest.raises(ValueError, match="keep_lm_head must be false for .*: it has a token classifier"):
        load_checkpoint(tmp_path, keep_lm_head=True)
    with pytest.raises(ValueError, match="the checkpoint has a token classifier, not a plain language model"):
        load_checkpoint(tmp_path, head=HeadSpec(rows=(1, 2), mix=(0, 1)))


def test_value_head(tmp_path):
    """Skywork: a causal model with v_head beside it."""
    write_tiny(tmp_path, "qwen2_window")
    weight, bias = torch.randn(1, 256), torch.randn(1)
    rewrite(tmp_path, lambda t: t.update({"v_head.summary.weight": weight, "v_head.summary.bias": bias}))
    head = load_checkpoint(tmp_path).head
    hidden = torch.randn(5, 256)
    torch.testing.assert_close(apply(head, hidden), (hidden @ weight[0] + bias).sigmoid())


@pytest.mark.parametrize("with_lm_head", [False, True])
def test_two_layer_classifier(tmp_path, with_lm_head):
    """Qwen2.5-Math-PRM: Sequential(Linear, ReLU, Linear(2)); its files also hold an unused lm_head."""
    write_tiny(tmp_path, "qwen2", head_dim=None)
    first, second = torch.nn.Linear(448, 448), torch.nn.Linear(448, 2)

    def change(tensors):
        if not with_lm_head:
            del tensors["lm_head.weight"]
        for index, layer in ((0, first), (2, second)):
            tensors[f"score.{index}.weight"], tensors[f"score.{index}.bias"] = (
                layer.weight.data,
                layer.bias.data,
            )

    rewrite(tmp_path, change)
    rename_architecture(tmp_path, "Qwen2ForProcessRewardModel")
    checkpoint = load_checkpoint(tmp_path, torch.float32)
    hidden = torch.randn(5, 448)
    expected = torch.nn.Sequential(first, torch.nn.ReLU(), second)(hidden).softmax(-1)[:, 1]
    torch.testing.assert_close(apply(checkpoint.head, hidden), expected)
    assert "lm_head.weight" not in checkpoint.weights


@pytest.mark.parametrize("variant", ["llama", "llama_smollm2"])  # an untied and a tied vocabulary head
@pytest.mark.parametrize(
    "spec, expected",
    [
        (HeadSpec(rows=(4, 9), mix=(1, 0)), lambda logits: logits[:, [4, 9]].softmax(-1)[:, 0]),
        (HeadSpec(rows=(130, 9), mix=(0, 1)), lambda logits: logits[:, [130, 9]].softmax(-1)[:, 1]),
        (HeadSpec(rows=(4, 9), mix=(1, -1)), lambda logits: logits[:, [4, 9]].softmax(-1) @ torch.tensor([1.0, -1])),
        (HeadSpec(rows=(4, 9, 0), mix=(0, 1, 1)), lambda logits: 1 - logits[:, [4, 9, 0]].softmax(-1)[:, 0]),
        (HeadSpec(rows=(7,), squash="none"), lambda logits: logits[:, 7]),
        (HeadSpec(vocab_mean=True, squash="sigmoid"), lambda logits: logits.mean(-1).sigmoid()),
    ],
)
def test_language_model_heads(tmp_path, variant, spec, expected):
    model = write_tiny(tmp_path, variant)
    checkpoint = load_checkpoint(tmp_path, torch.float32, spec)
    hidden = torch.randn(7, model.config.hidden_size)
    with torch.no_grad():
        logits = model.lm_head(hidden)
    torch.testing.assert_close(apply(checkpoint.head, hidden), expected(logits))
    assert len(checkpoint.head.weight) == (1 if len(spec.mix) < 3 and spec.mix != (1, -1) else len(spec.rows))
    assert "lm_head.weight" not in checkpoint.weights and not checkpoint.keeps_lm_head


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_model_keeps_the_vocabulary_head_only_if_asked(tmp_path, impl, request):
    if impl == "cpu":
        request.getfixturevalue("cpu_extension")
    write_tiny(tmp_path, "llama")
    spec = HeadSpec(rows=(4, 9), mix=(1, 0))
    verifier = load_model(tmp_path, torch.float32, impl, spec)
    both = load_model(tmp_path, torch.float32, impl, head=spec, keep_lm_head=True)
    policy = load_model(tmp_path, torch.float32, impl)
    assert verifier.lm_head is None and verifier.head is not None
    assert torch.equal(both.lm_head, policy.lm_head) and torch.equal(both.head.weight, verifier.head.weight)
    assert policy.head is None
    if impl == "reference":
        assert "lm_head.weight" not in verifier._decoder.packed and "lm_head.weight" in both._decoder.packed


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"squash": "difference"}, "squash must be one of"),
        ({"rows": (1, 2), "vocab_mean": True}, r"rows must be empty with vocab_mean, got \(1, 2\)"),
        ({"rows": (1, 1), "mix": (1, 0)}, r"rows must be distinct token ids, got \(1, 1\)"),
        ({"rows": (1, -1), "mix": (1, 0)}, r"rows must be distinct token ids, got \(1, -1\)"),
        ({"rows": (1, 2)}, r"mix must have a number for each of 2 labels, got \(\)"),
        ({"rows": (1, 2), "mix": (1.0, float("inf"))}, r"mix must be finite, got \(1.0, inf\)"),
        ({"vocab_mean": True}, "squash must be 'sigmoid' or 'none' for one label"),
    ],
)
def test_head_spec_invalid(fields, message):
    with pytest.raises(ValueError, match=message):
        HeadSpec(**fields)


@pytest.mark.parametrize("spec", [HeadSpec(mix=(0, 1)), HeadSpec(rows=(4, 131), mix=(0, 1))])
def test_rows_a_language_model_does_not_have(tmp_path, spec):
    write_tiny(tmp_path, "llama")
    with pytest.raises(ValueError, match=r"head must name rows in 0..130 of the language-model head, or vocab_mean"):
        load_checkpoint(tmp_path, head=spec)


def test_missing_head_is_never_random(tmp_path):
    write_tiny(tmp_path, "qwen2", kind="ForTokenClassification")
    rewrite(tmp_path, lambda t: t.pop("score.weight"))
    with pytest.raises(ValueError, match="Qwen2ForTokenClassification checkpoint must hold score.weight"):
        load_checkpoint(tmp_path)
    for kind in HEAD_KINDS:
        architecture = kind.architectures[0].replace("*", "Qwen2")
        for name in kind.required():
            with pytest.raises(ValueError, match="must hold"):
                head_kind(architecture, set(kind.names()) - {name})


def test_wrong_head_shape(tmp_path):
    write_tiny(tmp_path, "qwen2", kind="ForTokenClassification", num_labels=2)
    rewrite(tmp_path, lambda t: t.update({"score.weight": t["score.weight"][:, :100].clone()}))
    with pytest.raises(ValueError, match=r"score.weight must have shape \(2, 448\), got \(2, 100\)"):
        load_checkpoint(tmp_path)


def test_unknown_architecture():
    with pytest.raises(
        ValueError, match="architectures must name a .*ForCausalLM or one of .*, got 'LlamaModel'"
    ):
        head_kind("LlamaModel", ["model.norm.weight"])
