import importlib.util

import pytest
import torch
from smollm2 import gguf_file, model_folder

from ttskernels.models import gguf
from ttskernels.models.loading import load_checkpoint


@pytest.fixture
def tiny_gguf(tmp_path, monkeypatch):
    """A Llama in GGUF with the tensor names of llama.cpp, float32; the converted copy goes to tmp_path / cache."""
    writer_module = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    monkeypatch.setenv("TTSK_CACHE", str(tmp_path / "cache"))

    def write(architecture="llama", drop=(), extra=(), entries=()):
        file = tmp_path / "tiny.gguf"
        writer = writer_module.GGUFWriter(file, architecture)
        writer.add_name("tiny")
        writer.add_context_length(128)
        writer.add_embedding_length(64)
        writer.add_block_count(1)
        writer.add_feed_forward_length(96)
        writer.add_head_count(2)
        writer.add_head_count_kv(1)
        writer.add_rope_dimension_count(32)
        writer.add_rope_freq_base(10000.0)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(40)
        writer.add_eos_token_id(2)
        for name, value in entries:
            writer.add_float32(name, value)
        shapes = {
            "token_embd.weight": (40, 64),
            "output_norm.weight": (64,),
            "blk.0.attn_norm.weight": (64,),
            "blk.0.ffn_norm.weight": (64,),
            "blk.0.attn_q.weight": (64, 64),
            "blk.0.attn_k.weight": (32, 64),
            "blk.0.attn_v.weight": (32, 64),
            "blk.0.attn_output.weight": (64, 64),
            "blk.0.ffn_gate.weight": (96, 64),
            "blk.0.ffn_up.weight": (96, 64),
            "blk.0.ffn_down.weight": (64, 96),
        } | {name: (16,) for name in extra}
        for name, shape in shapes.items():
            if name not in drop:
                writer.add_tensor(name, torch.randn(shape).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file

    return write


def test_converted_once(tiny_gguf, monkeypatch):
    file = tiny_gguf()
    first = load_checkpoint(file, torch.float32)
    assert (first.config.layers, first.config.kv_heads, first.config.eos_ids) == (1, 1, (2,))
    monkeypatch.setattr(gguf, "convert", lambda *a: pytest.fail("converted twice"))
    again = load_checkpoint(file.parent, torch.float32)  # the folder with the file is the same file
    assert again.folder == first.folder
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in first.weights.items())
    monkeypatch.undo()


def test_changed_file_is_converted_again(tiny_gguf):
    first = load_checkpoint(tiny_gguf(), torch.float32)
    second = load_checkpoint(tiny_gguf(), torch.float32)
    assert first.folder != second.folder
    name = "model.norm.weight"
    assert not torch.equal(first.weights[name], second.weights[name])


@pytest.mark.parametrize("keep", [0, 3, 20, 0.3, 0.9, -1])
def test_truncated(tiny_gguf, keep):
    file = tiny_gguf()
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match="tiny.gguf is not a complete GGUF file .*; download it again"):
        load_checkpoint(file)
    assert not list(file.parent.glob("cache/gguf/*/*"))


def test_unsupported(tiny_gguf):
    with pytest.raises(ValueError, match="model_type must be one of llama, .*, got 'bloom'"):
        load_checkpoint(tiny_gguf(architecture="bloom"))
    with pytest.raises(ValueError, match=r"scales its rotary frequencies \(rope_freqs.weight\)"):
        load_checkpoint(tiny_gguf(extra=["rope_freqs.weight"]))
    with pytest.raises(ValueError, match="tiny.gguf lacks .*up_proj"):
        load_checkpoint(tiny_gguf(drop=["blk.0.ffn_up.weight"]))
    with pytest.raises(ValueError, match=r"scales its rotary frequencies \(rope.scale_linear 4.0\)"):
        load_checkpoint(tiny_gguf(entries=[("llama.rope.scale_linear", 4.0)]))
    load_checkpoint(tiny_gguf(entries=[("llama.rope.scale_linear", 1.0)]))
    with pytest.raises(ValueError, match="tiny.gguf cannot be read by transformers .*mistral"):
        load_checkpoint(tiny_gguf(architecture="mistral"))


@pytest.mark.parametrize(
    "extra", ["blk.0.attn_q.bias", "blk.0.attn_k_norm.weight", "blk.0.ffn_up.bias", "blk.1.attn_norm.weight", "cls.weight"]
)
def test_no_tensor_is_dropped(tiny_gguf, extra):
    with pytest.raises(ValueError, match=f"tiny.gguf holds {extra}, which a llama model read from GGUF would not use"):
        load_checkpoint(tiny_gguf(extra=[extra]))


def test_old_rotary_tensors_are_ignored(tiny_gguf):
    load_checkpoint(tiny_gguf(extra=["blk.0.attn_rot_embd.weight"]))


@pytest.mark.parametrize("removed", [["config.json"], ["model.safetensors"], ["config.json", "model.safetensors"]])
def test_a_copy_whose_files_are_gone_is_made_again(tiny_gguf, monkeypatch, removed):
    file = tiny_gguf()
    first = load_checkpoint(file, torch.float32)
    for name in removed:
        (first.folder / name).unlink()
    again = load_checkpoint(file, torch.float32)
    assert again.folder == first.folder and again.weights.keys() == first.weights.keys()
    assert list(first.folder.parent.iterdir()) == [first.folder]
    monkeypatch.setattr(gguf, "convert", lambda *a: pytest.fail("converted again"))
    load_checkpoint(file, torch.float32)


def test_extra_missing(tiny_gguf, monkeypatch):
    file, find = tiny_gguf(), importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "accelerate" else find(name)
    )
    with pytest.raises(ImportError, match=r"needs the package accelerate; pip install 'ttskernels\[gguf\]'"):
        load_checkpoint(file)


@pytest.mark.slow
def test_smollm2_from_gguf_and_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TTSK_CACHE", str(tmp_path))
    folder = load_checkpoint(model_folder(), torch.bfloat16)
    direct = load_checkpoint(gguf_file(), torch.bfloat16)
    assert (
        folder.config.model_type == "llama" and folder.config.eos_ids == (2,) and folder.config.tie_embeddings
    )
    assert all(torch.equal(direct.weights[name], tensor) for name, tensor in folder.weights.items())


@pytest.mark.slow
def test_smollm2_tokenizer():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token_id == 2
