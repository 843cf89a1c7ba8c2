"""A model whose int8 weights were rounded for its own text: more accurate, found again, and never by mistake."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from prm_checkpoints import write_qwen_prm
from safetensors.torch import load_file, save_file
from tiny_models import config_of, rewrite, write_tiny
from trees import stack, walk

from ttskernels.models import calibrate, load_checkpoint, load_model
from ttskernels.models.calibrated import (
    CalibrationError,
    calibration_file,
    head_file,
    keep_calibration,
    read_calibration,
)
from ttskernels.models.calibration import _observe, own_texts
from ttskernels.models.decoder import CALIBRATED, Forms
from ttskernels.models.model import Model, forms_of
from ttskernels.models.native import NativeDecoder
from ttskernels.ops.linear import Rounded

VOCAB, FP32, HEAD = 131, torch.float32, "lm_head.weight"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TTSK_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    write_tiny(tmp_path / "model", "qwen2")
    return tmp_path / "model"


def rms(t):
    return t.square().mean().sqrt()


@pytest.mark.parametrize("variant", ["llama", "llama_smollm2", "qwen2", "qwen3"])
def test_calibrated_weights_of_every_implementation(variant, cpu_extension, tmp_path):
    """Against the exact model: less far than the same forms with plain rounding; and alike in C++ and PyTorch. The walks read
    random ids, so the texts are such."""
    folder = tmp_path / "model"
    write_tiny(folder, variant)
    done = []
    texts = [torch.randint(0, VOCAB, (60,)).tolist() for _ in range(20)]
    file = calibrate(folder, FP32, texts=texts, progress=lambda *step: done.append(step))
    layers = load_checkpoint(folder).config.layers
    assert file.is_file() and done == [(i, layers, "layers") for i in range(layers + 1)]

    def run(model):
        return stack([row for seed in range(3) for row in walk(model, VOCAB, seed)])

    exact, ours, theirs = (
        run(load_model(folder, FP32, impl, weights=weights))
        for impl, weights in (("reference", "float"), ("cpu", "calibrated"), ("reference", "calibrated"))
    )
    checkpoint = load_checkpoint(folder, FP32)
    plain = NativeDecoder(checkpoint.config, checkpoint.weights, True, CALIBRATED)
    cost = rms(run(Model(checkpoint, plain, "cpu")) - exact)
    assert rms(ours - theirs) <= cost / 3  # an input near a half is rounded one way here, the other way there
    assert 0 < rms(ours - exact) < cost


def test_forms_of_a_calibrated_model():
    assert forms_of("calibrated", "cpu", torch.bfloat16) == CALIBRATED == Forms("int8", "int8", "int8")


def test_rounded_matrices_have_the_form_and_shape_of_the_decoder(folder):
    calibrate(folder, FP32, texts=[range(50)])
    checkpoint = load_checkpoint(folder, FP32)
    rounded = read_calibration(checkpoint, True)
    with pytest.raises(RuntimeError, match="has scales, but is no int8 matrix"):
        NativeDecoder(checkpoint.config, checkpoint.weights, True, Forms("int8", "int16", "int16"), rounded)
    name = "model.layers.0.self_attn.o_proj.weight"
    short = Rounded(rounded[name].values[:-1], rounded[name].scales[:-1], rounded[name].in_features, FP32)
    with pytest.raises(RuntimeError, match="rounded values must be contiguous int8"):
        NativeDecoder(checkpoint.config, checkpoint.weights, True, CALIBRATED, rounded | {name: short})


def test_own_texts_are_samples_of_the_model(folder):
    done = []
    texts = own_texts(load_checkpoint(folder, FP32), texts=5, tokens=40, progress=lambda *step: done.append(step))
    assert done == [(n * 5, 39 * 5, "tokens") for n in (0, 16, 32, 39)]
    assert [len(text) for text in texts] == [40] * 5 and len({tuple(text) for text in texts}) == 5
    assert all(text[0] == 1 and max(text) < VOCAB for text in texts)  # config.json's bos_token_id
    assert own_texts(load_checkpoint(folder, FP32), texts=2, tokens=40) == texts[:2]
    assert len(own_texts(load_checkpoint(folder), texts=1, tokens=999)[0]) == 256  # max_position_embeddings


def test_only_the_weights_that_were_calibrated(folder):
    with pytest.raises(CalibrationError, match="needs a calibration of the weights .* make it once: ttsearch calibrate"):
        load_model(folder, FP32, weights="calibrated")
    with pytest.raises(CalibrationError, match="--dtype fp16$"):
        load_model(folder, torch.float16, weights="calibrated")
    file = calibrate(folder, FP32, texts=[range(20), [], range(40, 90)])
    assert set(file.parent.iterdir()) == {file, head_file(file, load_checkpoint(folder, FP32))}
    load_model(folder, FP32, weights="calibrated")
    with pytest.raises(CalibrationError, match="needs a calibration"):
        load_model(folder, torch.bfloat16, weights="calibrated")
    assert calibration_file(load_checkpoint(folder, FP32)) == file
    rewrite(folder, lambda t: t["model.layers.1.mlp.down_proj.weight"][5, 7].add_(0.5))
    assert calibration_file(load_checkpoint(folder, FP32)) != file


def equal(a, b):
    return torch.equal(a.values, b.values) and torch.equal(a.scales, b.scales)


def test_every_head_has_a_file_of_its_own(folder):
    """Two policies and a verifier with the same layers: none reads or overwrites another's head."""
    texts = [torch.randint(0, VOCAB, (60,)).tolist()]
    file = calibrate(folder, FP32, texts=texts)
    first = read_calibration(load_checkpoint(folder, FP32), True)
    verifier = replace(load_checkpoint(folder, FP32), keeps_lm_head=False)
    verifier.weights = {name: weight for name, weight in verifier.weights.items() if name != HEAD}
    assert keep_calibration(verifier, _observe(verifier, texts, None)) == file
    rewrite(folder, lambda t: t.update({HEAD: t[HEAD].flip(0)}))
    with pytest.raises(CalibrationError, match="needs a calibration of the weights in .*, and there is no .*make it once"):
        load_model(folder, FP32, weights="calibrated")
    assert calibrate(folder, FP32, texts=texts) == file
    second = read_calibration(load_checkpoint(folder, FP32), True)
    assert torch.equal(second[HEAD].values, first[HEAD].values.flip(0))
    rewrite(folder, lambda t: t.update({HEAD: t[HEAD].flip(0)}))
    again = read_calibration(load_checkpoint(folder, FP32), True)
    assert again.keys() == first.keys() and all(equal(again[name], first[name]) for name in first)
    assert HEAD not in read_calibration(verifier, False)


@pytest.mark.parametrize("variant", ["qwen2", "llama_smollm2"])
def test_a_file_of_before_counts_where_its_head_is_the_embedding(variant, tmp_path):
    """Such files held the head as well, whichever it was."""
    write_tiny(tmp_path / "model", variant)
    file = calibrate(tmp_path / "model", FP32, texts=[range(50)])
    checkpoint = load_checkpoint(tmp_path / "model", FP32)
    own = head_file(file, checkpoint)
    save_file(load_file(file) | load_file(own), file)
    own.unlink()
    if HEAD in checkpoint.weights:
        with pytest.raises(CalibrationError, match=f"there is no {own}"):
            read_calibration(checkpoint, True)
    else:
        assert HEAD in read_calibration(checkpoint, True)


def test_many_writers_with_one_process_id(folder, monkeypatch):
    """As in two containers that share a cache."""
    monkeypatch.setattr("os.getpid", lambda: 7)
    checkpoint = load_checkpoint(folder, FP32)
    rounded = _observe(checkpoint, [list(range(50))], None)
    with ThreadPoolExecutor(2) as threads:
        file, *_ = threads.map(lambda _: keep_calibration(checkpoint, rounded), range(100))
    assert len(read_calibration(checkpoint, True)) == len(rounded) and len(list(file.parent.iterdir())) == 2


def test_a_damaged_file_is_said_so(folder):
    file = calibrate(folder, FP32, texts=[range(50)])
    file = head_file(file, load_checkpoint(folder, FP32))
    tensors = load_file(file)
    for changed in ({HEAD: tensors[HEAD][:-1]}, {HEAD: tensors[HEAD].int()}, {f"{HEAD}.scales": tensors[HEAD].float()}):
        save_file(tensors | changed, file)
        with pytest.raises(CalibrationError, match="no calibration of these weights .*calibrate again"):
            load_model(folder, FP32, weights="calibrated")
    save_file({"another": tensors[HEAD]}, file)
    with pytest.raises(CalibrationError, match="lm_head"):
        load_model(folder, FP32, weights="calibrated")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CalibrationError, match="no calibration of these weights"):
        load_model(folder, FP32, weights="calibrated")


def test_a_reward_model_needs_texts(tmp_path):
    folder = tmp_path / "prm"
    folder.mkdir()
    write_qwen_prm(folder, config_of("qwen2"))
    with pytest.raises(ValueError, match="texts must hold token ids .* it has a score head"):
        calibrate(folder, FP32)
    texts = [torch.randint(0, VOCAB, (40,)).tolist() for _ in range(8)]
    assert not any(name.startswith("lm_head") for name in load_file(calibrate(folder, FP32, texts=texts)))
    exact, ours = (
        stack(walk(load_model(folder, FP32, weights=weights), VOCAB, output="hidden")) for weights in ("float", "calibrated")
    )
    assert 0 < rms(ours - exact) <= 0.05 * exact.std()


@pytest.mark.parametrize(
    "texts, message", [([], "got none"), ([[]], "got none"), ([[VOCAB]], r"0\.\.130, got 131"), ([[-1]], "-1")]
)
def test_bad_texts(folder, texts, message):
    with pytest.raises(ValueError, match=f"texts must .*{message}"):
        calibrate(folder, FP32, texts=texts)


def test_activations_that_are_not_finite(folder):
    rewrite(folder, lambda t: t["model.layers.1.mlp.up_proj.weight"].fill_(1e38))
    with pytest.raises(CalibrationError, match=r"layers\.1\.mlp\.down_proj\.weight cannot be calibrated: .* not finite"):
        calibrate(folder, FP32, texts=[range(50)])


def test_a_folder_that_cannot_be_written(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TTSK_CACHE", str(tmp_path / "file"))
    with pytest.raises(CalibrationError, match="cannot be kept as .*; set TTSK_CACHE"):
        calibrate(folder, FP32, texts=[range(50)])
