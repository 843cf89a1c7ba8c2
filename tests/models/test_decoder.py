"""Logits of the decoder equal transformers' eager model: prefill, forks, ragged steps, decode iterations."""

import pytest
import torch
from tiny_models import VARIANTS, write_tiny
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification
from trees import expected, stack, walk

from ttskernels import available
from ttskernels.models import Model, load_checkpoint, load_model
from ttskernels.models.decoder import PythonDecoder
from ttskernels.models.model import with_kv
from ttskernels.ops.rms_norm import rms_norm

VOCAB = 131


@pytest.fixture(params=["reference", "cpu-ops", "cpu"])
def load(request):
    """`load(folder, dtype)` by each implementation: PyTorch, the Python decoder over the C++ ops, the C++ decoder."""
    impl = request.param
    if reason := available(impl.removesuffix("-ops")):
        pytest.skip(reason)

    def load(folder, dtype, kv="float"):
        if impl != "cpu-ops":
            return load_model(folder, dtype, impl, kv=kv)
        checkpoint = with_kv(load_checkpoint(folder, dtype), kv, impl)
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
    *((variant, torch.bfloat16, "float") for variant in VARIANTS),
    ("llama_rope3_bias", torch.float16, "float"),
    ("qwen3", torch.float16, "float"),
    *((variant, torch.bfloat16, "int16") for variant in VARIANTS),
]


@pytest.mark.parametrize("variant, dtype, kv", LOW_PRECISION)
def test_low_precision(variant, dtype, kv, load, tmp_path):
    """Largest and root-mean-square error over three walks: one row's largest error alone is a matter of luck.

    K and V in int16 are no further from the exact ones than bf16 ones may be.
    """
    write_tiny(tmp_path, variant)
    model = load(tmp_path, dtype, kv)
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


@pytest.mark.parametrize("variant", ["llama", "mistral_window", "qwen3"])
def test_int8_pages_of_every_implementation(variant, load, tmp_path):
    """What rounding K and V costs is one thing; an implementation may add a quarter of it to the reference's."""
    write_tiny(tmp_path, variant)
    models = [load(tmp_path, torch.float32, "int8")]
    models += [load_model(tmp_path, torch.float32, "reference", kv=kv) for kv in ("int8", "float")]
    ours, rounded, exact = (stack([row for seed in range(3) for row in walk(model, VOCAB, seed)]) for model in models)
    cost = (rounded - exact).square().mean().sqrt()
    assert 0 < cost <= 0.05 * exact.std()
    assert (ours - rounded).square().mean().sqrt() <= cost / 4


@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3"])
def test_int8_weights_of_every_implementation(variant, isa, tmp_path):
    """As above, of matrices; a bf16 model of those may be as far from the exact ones as their cost and bf16's own."""
    write_tiny(tmp_path, variant)

    def run(impl, weights, dtype=torch.float32):
        model = load_model(tmp_path, dtype, impl, weights=weights, kv="float")
        return stack([row for seed in range(3) for row in walk(model, VOCAB, seed)])

    exact, rounded, low = run("reference", "float"), run("reference", "int8"), run("reference", "float", torch.bfloat16)
    cost, own = ((t - exact).square().mean().sqrt() for t in (rounded, low))
    assert 0 < cost <= 0.05 * exact.std()
    assert (run("cpu", "int8") - rounded).square().mean().sqrt() <= cost / 4
    assert (run("cpu", "int8", torch.bfloat16) - exact).square().mean().sqrt() <= 1.25 * (cost + own)
