import json

import pytest
import torch
from tiny_models import rewrite, write_tiny

from ttskernels.models.heads import HEAD_KINDS, ScoreHead, head_kind, lm_rows_head, vocab_mean_head
from ttskernels.models.loading import load_checkpoint


def apply(head: ScoreHead, hidden):
    """Scores of `hidden` (after the final norm), written out."""
    if head.inner_weight is not None:
        hidden = torch.relu(hidden @ head.inner_weight.T + head.inner_bias)
    logits = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    if head.squash == "softmax":
        return logits.softmax(-1)[:, head.label]
    return logits[:, head.label].sigmoid() if head.squash == "sigmoid" else logits[:, head.label]


def rename_architecture(folder, name):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": [name]}))


@pytest.mark.parametrize("labels", [1, 2, 3])
def test_token_classifier(tmp_path, labels):
    model = write_tiny(tmp_path, "qwen2", kind="ForTokenClassification", num_labels=labels)
    checkpoint = load_checkpoint(tmp_path)
    head = checkpoint.head
    ids = torch.randint(0, 131, (1, 9))
    with torch.no_grad():
        logits = model(ids).logits[0]
        hidden = model.model(ids).last_hidden_state[0]
    expected = logits[:, 0] if labels == 1 else logits.softmax(-1)[:, 1]
    torch.testing.assert_close(apply(head, hidden), expected)
    assert head.weight.dtype == torch.float32 and "lm_head.weight" not in checkpoint.weights


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


def test_language_model_heads():
    lm_head, hidden = torch.randn(50, 16), torch.randn(7, 16)
    logits = hidden @ lm_head.T
    expected = logits[:, [4, 9]].softmax(-1)[:, 0]
    torch.testing.assert_close(apply(lm_rows_head(lm_head, good=4, bad=9), hidden), expected)
    torch.testing.assert_close(apply(vocab_mean_head(lm_head), hidden), logits.mean(-1).sigmoid())


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
