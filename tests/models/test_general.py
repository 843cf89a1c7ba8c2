"""Models that run by transformers' own modules over our pages: logits, search, what is refused."""

import copy

import pytest
import torch
from engines import END, Search, stop_table
from general_models import GENERAL, general_tiny
from tiny_models import rewrite, write_tiny
from trees import expected, stack, walk

from ttskernels import available
from ttskernels.engine.batcher import Engine
from ttskernels.integrations.transformers import as_model
from ttskernels.models import load_model
from ttskernels.models.general_model import general_model

VOCAB = 131
PROMPT = [3, 9, 11, 24, 90, 17, 33, 2, 8, 120, 44, 61, 70, 15, 19]


@pytest.mark.parametrize("variant", GENERAL)
def test_logits_over_forked_pages_equal_eager_ones(variant, impl):
    theirs = general_tiny(variant)
    model = general_model(copy.deepcopy(theirs), impl)
    seen = walk(model, VOCAB)
    exact = expected(lambda ids: theirs(ids).logits, seen)
    assert exact.std() > 0.1  # a model whose logits do not depend on its input would prove nothing
    assert (stack(seen) - exact).abs().max() / exact.std() <= 2e-4


@pytest.mark.parametrize("variant", ["gemma2", "gemma3", "phi3"])
@pytest.mark.parametrize("dtype, kv", [(torch.bfloat16, "float"), (torch.bfloat16, "int16"), (torch.float16, "float")])
def test_low_precision(variant, dtype, kv, cpu_extension):
    low = general_tiny(variant, dtype=dtype)
    model = general_model(copy.deepcopy(low), "cpu", kv)
    seen = [row for seed in range(3) for row in walk(model, VOCAB, seed)]
    theirs = expected(lambda ids: low(ids).logits, seen).double()
    wide = copy.deepcopy(low).double()
    exact = expected(lambda ids: wide(ids).logits, seen)
    ours, theirs = (stack(seen) - exact).square().mean(), (theirs - exact).square().mean()
    assert ours <= 2**2 * theirs, f"mean square error {ours:.3g}, transformers' own {theirs:.3g}"


def test_pages_of_a_byte_are_no_reason_to_refuse_a_model(cpu_extension):
    theirs = general_tiny("gemma2")
    seen = walk(general_model(copy.deepcopy(theirs), "cpu", "int8"), VOCAB)
    exact = expected(lambda ids: theirs(ids).logits, seen)
    assert 1e-4 < (stack(seen) - exact).square().mean().sqrt() / exact.std() < 0.1


def test_hidden_states_are_those_of_the_trunk(impl):
    theirs = general_tiny("gemma2")
    model = general_model(copy.deepcopy(theirs), impl)
    seen = walk(model, VOCAB, output="hidden")
    exact = expected(lambda ids: theirs.model(ids).last_hidden_state, seen)
    assert (stack(seen) - exact).abs().max() / exact.std() <= 2e-4


def test_triton_kernels_serve_it_too():
    if reason := available("triton"):
        pytest.skip(reason)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    theirs = general_tiny("gemma2")
    model = general_model(copy.deepcopy(theirs).to(device), "triton")
    seen = walk(model, VOCAB)
    exact = expected(lambda ids: theirs(ids).logits, seen)
    assert (stack(seen).cpu() - exact).abs().max() / exact.std() <= 2e-4


def search(policy, verifier=None, seed=0, kv_bytes=1 << 28):
    engine = Engine(policy, verifier, next_state=stop_table(), kv_bytes=kv_bytes)
    try:
        return Search(engine, PROMPT, seed=seed).run(), engine.budget.peak_bytes
    finally:
        engine.shutdown()


def test_a_search_is_the_fused_decoders(tmp_path, impl):
    """Trees of one checkpoint by both ways: ids and reasons equal, in fp32 no draw of a hundred is close enough to differ."""
    hf = write_tiny(tmp_path / "policy", "llama")
    write_tiny(tmp_path / "verifier", "qwen2", kind="ForTokenClassification")
    verifier = load_model(tmp_path / "verifier", torch.float32, impl)
    fused, _ = search(as_model(hf, impl=impl), verifier)
    general, _ = search(as_model(hf, impl=impl, general=True), verifier)
    assert {k: v[:2] for k, v in fused.items()} == {k: v[:2] for k, v in general.items()} and len(fused) > 8
    assert all(abs(v[2] - general[k][2]) < 1e-4 for k, v in fused.items())


def test_a_policy_of_experts_searches_in_a_quarter_of_the_memory(tmp_path, cpu_extension):
    write_tiny(tmp_path, "qwen2", kind="ForTokenClassification")
    verifier = load_model(tmp_path, torch.float32, "cpu")
    model = general_model(general_tiny("qwen3_moe"))
    roomy, peak = search(model, verifier)
    tight, _ = search(model, verifier, kv_bytes=max(peak // 4, 1 << 18))
    assert roomy.keys() == tight.keys() and {k: v[0] for k, v in roomy.items()} == {k: v[0] for k, v in tight.items()}


@pytest.mark.parametrize("variant", ["llama", "mistral_window"])
def test_flops_are_the_fused_decoders(variant, tmp_path):
    hf = write_tiny(tmp_path, variant)
    fused, general = as_model(hf).config, as_model(hf, general=True).config
    for output in ("logits", "hidden"):
        assert general.flops(30, 20, output) == fused.flops(30, 20, output)
    assert general.flops(30, 20, "kv") == fused.flops(30, 20, "hidden")  # whole rows are computed all the same
    assert general.kv_bytes_per_token == fused.kv_bytes_per_token


def test_flops_count_the_experts_that_a_token_is_sent_to():
    four, two = (general_model(general_tiny("mixtral", num_experts_per_tok=n)).config.layer_weights for n in (4, 2))
    assert four - two == 2 * (2 * 3 * 64 * 96)  # two layers; gate, up and down of two experts


@pytest.mark.parametrize("variant", ["gemma2", "gpt_oss"])
def test_load_model_takes_a_folder(variant, tmp_path):
    theirs = general_tiny(variant)
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path, torch.float32)
    assert model.config.model_type == theirs.config.model_type and model.config.eos_ids == (END,)
    seen = walk(model, VOCAB)
    exact = expected(lambda ids: theirs(ids).logits, seen)
    assert (stack(seen) - exact).abs().max() / exact.std() <= 2e-4


def test_a_folder_that_lacks_a_weight_is_refused(tmp_path):
    general_tiny("olmo2").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop("model.layers.1.self_attn.o_proj.weight"))
    with pytest.raises(ValueError, match=r"missing_keys model\.layers\.1\.self_attn\.o_proj\.weight; download it again"):
        load_model(tmp_path, torch.float32)


def test_a_head_or_int8_weights_of_another_family_are_refused(tmp_path):
    general_tiny("gemma").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type must be one of llama, mistral, qwen2, qwen3, got 'gemma'"):
        load_model(tmp_path, torch.float32, weights="int8")


REFUSED = {
    "mamba": "layer_types of a mamba model must be full_attention or sliding_attention, got linear_attention",
    "llama4_text": "layer_types of a llama4_text model must be .*, got chunked_attention",
    "bloom": "each of the 2 layers of a bloom model must attend once .* layers: none",
    "diffllama": "transformers asked for layers: 0, 0, 1, 1. Layers with a state of their own, or several attentions",
    "phimoe": "sliding_window 5 of a phimoe model must reach its attention, which got none",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_models_that_pages_cannot_serve_are_refused(model_type):
    hf = general_tiny(model_type, sliding_window=5 if model_type == "phimoe" else None)
    with pytest.raises(ValueError, match=REFUSED[model_type]):
        general_model(hf)
    ids = torch.tensor([PROMPT])
    assert hf(ids).logits.isfinite().all() and hf.config._attn_implementation == "eager"  # as it was


def test_a_model_whose_attention_is_not_all_that_reads_tokens_is_refused():
    """A layer that adds the mean of all rows to each: attention is called as it should be, and forks are wrong."""
    hf = general_tiny("gemma")
    hf.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out + out.mean(1, keepdim=True))
    with pytest.raises(ValueError, match="must give the same logits over forked pages .* they differ by"):
        general_model(hf)


def test_wrong_dtypes_and_wrong_places():
    mixed = general_tiny("gemma")
    mixed.model.norm.double()
    with pytest.raises(ValueError, match="all the same, got torch.float32, torch.float64"):
        general_model(mixed)
    with pytest.raises(ValueError, match="must have a vocabulary head, got a Gemma2Model"):
        general_model(general_tiny("gemma2").model)
    with pytest.raises(ValueError, match="heads of a gemma model must be at most 256 wide, got 272"):
        general_model(general_tiny("gemma", head_dim=260))
    hf = general_tiny("gemma")
    general_model(hf)
    with pytest.raises(RuntimeError, match=r'call set_attn_implementation\("sdpa"\)'):
        hf(torch.tensor([PROMPT]))
    hf.set_attn_implementation("sdpa")
    assert hf(torch.tensor([PROMPT])).logits.isfinite().all()


def test_frequencies_that_change_with_the_length_end_a_path_before_they_do():
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 64, "factor": 4.0}  # fmt: skip
    hf = general_tiny("phi3", rope_parameters=rope, original_max_position_embeddings=64)
    assert general_model(hf).config.max_positions == 64
