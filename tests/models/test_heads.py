import pytest
import torch
from tiny_models import write_tiny

from ttskernels.models import load_model
from ttskernels.models.heads import HeadSpec, ScoreHead
from ttskernels.models.loading import load_checkpoint


def apply(head: ScoreHead, hidden):
    """Scores of `hidden` (after the final norm), written out."""
    if head.inner_weight is not None:
        hidden = torch.relu(hidden @ head.inner_weight.T + head.inner_bias)
    logits = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    squash = {"softmax": lambda x: x.softmax(-1), "sigmoid": torch.sigmoid, "none": lambda x: x}[head.squash]
    return squash(logits) @ (torch.ones(1) if head.mix is None else head.mix)


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
