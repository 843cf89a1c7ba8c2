"""Logits of the decoder equal transformers' eager model: prefill, forks, ragged steps, decode iterations."""

import pytest
import torch
from tiny_models import VARIANTS, write_tiny
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification
from trees import expected, stack, walk

from ttskernels import available
from ttskernels.models import Model, load_checkpoint, load_model
from ttskernels.models.decoder import PythonDecoder
from ttskernels.ops.rms_norm import rms_norm

VOCAB = 131


@pytest.fixture(params=["reference", "cpu-ops", "cpu"])
def load(request):
    """`load(folder, dtype)` by each implementation: PyTorch, the Python decoder over the C++ ops, the C++ decoder."""
    impl = request.param
    if reason := available(impl.removesuffix("-ops")):
        pytest.skip(reason)

    def load(folder, dtype):
        if impl != "cpu-ops":
            return load_model(folder, dtype, impl)
        checkpoint = load_checkpoint(folder, dtype)
        return Model(checkpoint, PythonDecoder(checkpoint.config, checkpoint.weights, "cpu"), "cpu")

    return load


def hugging_face(folder, dtype=torch.float32, auto=AutoModelForCausalLM):
    return auto.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_fp32(variant, load, tmp_path):
    write_tiny(tmp_path, variant)
    seen = walk(load(tmp_path, torch.float32), VOCAB)
    theirs = hugging_face(tmp_path)
    exact = expected(lambda ids: theirs(ids).logits, seen)
    assert exact.std() > 0.3  # a model whose logits do not depend on its input would prove nothing
    assert (stack(seen) - exact).abs().max() / exact.std() <= 1e-4


LOW_PRECISION = [
    *((variant, torch.bfloat16) for variant in VARIANTS),
    ("llama_rope3_bias", torch.float16),
    ("qwen3", torch.float16),
]


@pytest.mark.parametrize("variant, dtype", LOW_PRECISION)
def test_low_precision(variant, dtype, load, tmp_path):
    """Largest and root-mean-square error over three walks: one row's largest error alone is a matter of luck."""
    write_tiny(tmp_path, variant)
    model = load(tmp_path, dtype)
    seen = [row for seed in range(3) for row in walk(model, VOCAB, seed)]
    low = hugging_face(tmp_path, dtype)
    theirs = expected(lambda ids: low(ids).logits, seen).double()
    wide = low.double()  # the same rounded weights; its rotary frequencies were never rounded
    exact = expected(lambda ids: wide(ids).logits, seen)
    ours, theirs = (stack(seen) - exact).abs(), (theirs - exact).abs()
    assert ours.max() <= 2 * theirs.max(), f"error {ours.max():.3g}, transformers' own {theirs.max():.3g}"
    assert ours.square().mean() <= 1.25**2 * theirs.square().mean()


@pytest.mark.parametrize("variant", ["qwen2", "mistral_window"])
def test_hidden_rows_of_a_verifier(variant, load, tmp_path):
    write_tiny(tmp_path, variant, kind="ForTokenClassification")
    model = load(tmp_path, torch.float32)
    seen = walk(model, VOCAB, output="hidden")
    trunk = hugging_face(tmp_path, auto=AutoModelForTokenClassification).model
    exact = expected(lambda ids: trunk(ids).last_hidden_state, seen)
    ours = rms_norm(stack(seen), model.norm, model.config.rms_eps)
    assert (ours - exact).abs().max() / exact.std() <= 1e-4
