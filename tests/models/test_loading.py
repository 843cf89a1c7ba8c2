import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from prm_checkpoints import to_bin
from tiny_models import VARIANTS, rewrite, write_tiny

from ttskernels.models.loading import expected_shapes, load_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
EMBED = "model.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path):
    write_tiny(tmp_path, "llama")
    return tmp_path


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_weight_arrives(variant, tmp_path):
    model = write_tiny(tmp_path, variant)
    checkpoint = load_checkpoint(tmp_path, torch.float32)
    expected = dict(model.state_dict())
    if checkpoint.config.tie_embeddings:
        del expected["lm_head.weight"]
    assert checkpoint.weights.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in checkpoint.weights.items())
    assert checkpoint.head is None


def test_sharded_index(tmp_path):
    model = write_tiny(tmp_path, "qwen3", shard="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    weights = load_checkpoint(tmp_path, torch.float32).weights
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(
        FileNotFoundError, match=f"{shard.name} is named by model.safetensors.index.json but is missing"
    ):
        load_checkpoint(tmp_path)


def test_dtype(folder):
    for dtype in (torch.bfloat16, torch.float16):
        assert {t.dtype for t in load_checkpoint(folder, dtype).weights.values()} == {dtype}
    with pytest.raises(ValueError, match="dtype must be one of .* got torch.int8"):
        load_checkpoint(folder, torch.int8)


def test_generation_config_names_the_end_ids(folder):
    assert load_checkpoint(folder).config.eos_ids == (7,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert load_checkpoint(folder).config.eos_ids == (7, 9)
    for wrong in ("7", [7, "9"], 7.0):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(ValueError, match="eos_token_id of .*generation_config.json must be a token id or a list of them"):
            load_checkpoint(folder)


def test_old_rotary_buffers_are_ignored(folder):
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32)}))
    load_checkpoint(folder)


def test_tied_checkpoint_with_a_copy_of_the_head(tmp_path):
    write_tiny(tmp_path, "llama_smollm2")
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t[EMBED].clone()}))
    assert "lm_head.weight" not in load_checkpoint(tmp_path).weights
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t[EMBED] + 1}))
    with pytest.raises(
        ValueError, match="lm_head.weight differs from model.embed_tokens.weight although tie_word"
    ):
        load_checkpoint(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t[EMBED].bfloat16()}))
    assert "lm_head.weight" not in load_checkpoint(tmp_path).weights
    rewrite(tmp_path, lambda t: (t[EMBED][3].fill_(float("nan")), t.update({"lm_head.weight": t[EMBED].clone()})))
    assert load_checkpoint(tmp_path).weights[EMBED].isnan().sum() == 192


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_missing_weight(folder, name):
    rewrite(folder, lambda t: t.pop(name))
    with pytest.raises(ValueError, match=f"lacks {name}, which a llama checkpoint"):
        load_checkpoint(folder)


def test_unexpected_weight(folder):
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(256)}))
    with pytest.raises(
        ValueError, match="holds model.layers.0.self_attn.q_proj.bias, which this decoder would not use"
    ):
        load_checkpoint(folder)


def test_wrong_shape(folder):
    rewrite(folder, lambda t: t.update({EMBED: t[EMBED][:100].clone()}))
    with pytest.raises(
        ValueError, match=r"embed_tokens.weight must have shape \(131, 64\) by config.json, got \(100, 64\)"
    ):
        load_checkpoint(folder)


def test_integer_weight(folder):
    rewrite(folder, lambda t: t.update({EMBED: t[EMBED].to(torch.int8)}))
    with pytest.raises(
        ValueError, match="embed_tokens.weight must be a 16, 32 or 64-bit float, got torch.int8"
    ):
        load_checkpoint(folder)
    rewrite(folder, lambda t: t.update({EMBED: torch.tensor(1.0)}))
    with pytest.raises(ValueError, match="embed_tokens.weight must be a matrix or a vector, got one number"):
        load_checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 4, 200, 0.5, -1])
def test_truncated_safetensors(folder, keep):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(
        ValueError, match="model.safetensors is not a complete safetensors file .*; download it again"
    ):
        load_checkpoint(folder)


def test_damaged_config(folder):
    (folder / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        load_checkpoint(folder)


@pytest.mark.parametrize("content", ["null", "[1]"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_json_that_is_no_object(folder, name, content):
    (folder / name).write_text(content)
    if "index" in name:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    with pytest.raises(ValueError, match=f"{name} must hold a JSON object, got "):
        load_checkpoint(folder)


def test_an_index_without_a_map(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    for content in ("{}", '{"weight_map": ["model.safetensors"]}', '{"weight_map": {"a": 3}}'):
        (folder / "model.safetensors.index.json").write_text(content)
        with pytest.raises(ValueError, match="index.json must name the file of every weight under weight_map, got "):
            load_checkpoint(folder)


def test_nothing_to_load(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint: expected config.json with"):
        load_checkpoint(tmp_path)
    with pytest.raises(
        FileNotFoundError, match="does not exist; pass a checkpoint folder, a .gguf file or a hub id"
    ):
        load_checkpoint(tmp_path / "absent")
    (tmp_path / "training_args.bin").write_bytes(b"x")  # what trainers leave beside a model
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        load_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="holds weights but no config.json"):
        load_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="must be a folder, a hub id or a .gguf file, got the file"):
        load_checkpoint(tmp_path / "pytorch_model.bin")
    for name in "ab":
        (tmp_path / "two").mkdir(exist_ok=True)
        (tmp_path / "two" / f"{name}.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"holds 2 .gguf files \(a.gguf, b.gguf\); pass one of them"):
        load_checkpoint(tmp_path / "two")


@pytest.mark.parametrize("keep", [0, 4, 200, 0.5, -1])
def test_truncated_bin(folder, keep):
    to_bin(folder)
    file = folder / "pytorch_model.bin"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match="pytorch_model.bin is not a complete PyTorch weight file .*; download it again"):
        load_checkpoint(folder)


def test_damaged_bin(folder):
    """The pickle inside is overwritten, the archive around it is whole."""
    to_bin(folder)
    file = folder / "pytorch_model.bin"
    data = bytearray(file.read_bytes())
    data[60:90] = b"\xff" * 30
    file.write_bytes(data)
    with pytest.raises(ValueError, match="is not a complete PyTorch weight file .Unsupported operand 255"):
        load_checkpoint(folder)


class Code:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
def test_bin_with_code_is_not_opened(folder, tmp_path, zipped):
    (folder / "model.safetensors").unlink()
    content = {EMBED: torch.ones(131, 64), "x": Code(tmp_path / "ran")}
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="pytorch_model.bin asks to load posix.mkdir: .*could run any code; it is not opened"):
        load_checkpoint(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [[torch.ones(2)], {"model": {EMBED: torch.ones(2)}}, {"step": 3}])
def test_bin_of_something_else(folder, content):
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin must hold a dict of tensors, got (list|dict)"):
        load_checkpoint(folder)


def test_bin_of_an_old_torch(folder):
    before = load_checkpoint(folder, torch.float32).weights
    to_bin(folder)
    file = folder / "pytorch_model.bin"
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    after = load_checkpoint(folder, torch.float32).weights
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_missing_bin_shard(folder):
    to_bin(folder, shards=2)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(FileNotFoundError, match="00002.bin is named by pytorch_model.bin.index.json but is missing"):
        load_checkpoint(folder)


def test_safetensors_before_bin(folder):
    (folder / "pytorch_model.bin").write_bytes(b"not even a file")
    load_checkpoint(folder)


def test_weight_that_is_there_twice(folder):
    rewrite(folder, lambda t: t.update({f"pretrained_model.{EMBED}": t[EMBED].clone()}))
    with pytest.raises(ValueError, match="embed_tokens.weight is there twice; the files are of two checkpoints"):
        load_checkpoint(folder)


def test_a_single_file_of_any_name(folder):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    load_checkpoint(folder)
    (folder / "other.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="must hold one of model.safetensors, .*got other.safetensors, weights"):
        load_checkpoint(folder)


def test_hub_id_offline(monkeypatch, tmp_path):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match="nobody/nothing is not a folder here, is not in the hub cache"):
        load_checkpoint("nobody/nothing")


def test_expected_shapes_of_a_biased_model(tmp_path):
    write_tiny(tmp_path, "qwen3")
    shapes = expected_shapes(load_checkpoint(tmp_path).config)
    assert shapes["model.layers.1.self_attn.q_norm.weight"] == (128,)
    assert shapes["model.layers.0.self_attn.o_proj.bias"] == (64,)


def test_no_tokenizer_below_the_line(folder):
    sources = [f for f in (REPOSITORY / "ttskernels").rglob("*.py") if "integrations" not in f.parts]
    for word in ("AutoTokenizer", "import tokenizers", "from tokenizers", "import ttsearch", "from ttsearch"):
        assert [str(f) for f in sources if word in f.read_text()] == []
    code = (
        "import sys; from ttskernels.models.loading import load_checkpoint; load_checkpoint(sys.argv[1]); "
        "print([m for m in sys.modules if 'tokenization_auto' in m or m == 'ttsearch'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr
