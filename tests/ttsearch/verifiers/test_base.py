"""Checkpoints that are not whole: an adapter, and PQM's weights without config.json or tokenizer, beside their base model."""

import json
import shutil

import pytest
from prm_checkpoints import write_pqm
from prm_models import SIZES, PlainIn, build_prm, tokenizer_of, write_prm
from prm_reference import REFERENCES
from tiny_models import config_of
from tiny_tokenizers import QWEN_SPLIT, byte_level
from tokenizers import AddedToken
from ttsearch import score_steps
from ttsearch.tokenizer import load_tokenizer
from ttsearch.verifiers.session import load_verifier
from typer.testing import CliRunner

PROBLEM = "what is 12 + 3?"
STEPS = ["Step 1: 12 + 3", "so we get = 15\nthen", "therefore the answer is \\boxed{15}"]


def scores_of(folder, **options):
    with load_verifier(folder, dtype="fp32", kv_bytes=1 << 26, **options) as verifier:
        return score_steps([PROBLEM], [[STEPS]], verifier)[0][0].scores


def expected(family, plain, tokenizer):
    """A step's first score is kept: that of the text so far."""
    prefixes = [STEPS[: k + 1] for k in range(len(STEPS))]
    return [float(REFERENCES[family](PlainIn(plain), tokenizer, PROBLEM, steps).scores[-1]) for steps in prefixes]


def test_weights_alone_take_configuration_from_their_base(tmp_path, cpu_extension):
    folder = tmp_path / "PQM"
    plain = build_prm(folder, "pqm", seed=3)
    assert not (folder / "config.json").exists()
    wanted = pytest.approx(expected("pqm", plain, tokenizer_of("pqm")), rel=1e-5, abs=1e-5)
    assert scores_of(folder, base=folder / "base") == wanted
    with pytest.raises(FileNotFoundError, match="weights but no config.json; .* or pass as base the model"):
        scores_of(folder)
    with pytest.raises(FileNotFoundError, match="base must hold a config.json, got .*elsewhere without"):
        scores_of(folder, base=tmp_path / "elsewhere")


def test_weights_alone_take_their_tokenizer_from_their_base_and_the_marker_behind_it(tmp_path, cpu_extension):
    tokenizer, folder = byte_level(QWEN_SPLIT, ["<bos>", "<eos>"], "<bos>", None), tmp_path / "PQM"
    sizes = SIZES | {"vocab_size": len(tokenizer) + 1}
    plain = write_pqm(folder, config_of("llama", **sizes), seed=3)
    tokenizer.save_pretrained(folder / "base")
    tokenizer.add_tokens([AddedToken("[PRM]", special=True, normalized=False)])
    assert tokenizer.encode("[PRM]", add_special_tokens=False) == [sizes["vocab_size"] - 1]
    wanted = pytest.approx(expected("pqm", plain, tokenizer), rel=1e-5, abs=1e-5)
    assert scores_of(folder, base=folder / "base") == wanted
    with pytest.raises(ValueError, match="PQM has no tokenizer files .*, or pass as base the model"):
        scores_of(folder)
    small = tmp_path / "small-pqm"
    write_pqm(small, config_of("llama", **SIZES | {"vocab_size": len(tokenizer) - 1}))
    with pytest.raises(ValueError, match=r"ends a step with ' \[PRM\]', ids .*; the checkpoint embeds \d+ tokens"):
        scores_of(small, base=folder / "base")


def test_an_adapters_base_may_have_moved(tmp_path, cpu_extension):
    folder = tmp_path / "Math-psa"
    plain = build_prm(folder, "math-psa", seed=3)
    for file in folder.glob("*token*"):
        file.rename(folder / "base" / file.name)
    moved = shutil.move(folder / "base", tmp_path / "Qwen")
    wanted = pytest.approx(expected("math-psa", plain, tokenizer_of("math-psa")), abs=1e-5)
    assert scores_of(folder, base=moved) == wanted
    assert load_tokenizer(folder, moved).get_vocab() == tokenizer_of("math-psa").get_vocab()


def test_the_command_line_takes_a_base(tmp_path, cpu_extension):
    from ttsearch.cli import app

    folder = write_prm(tmp_path / "PQM", "pqm", seed=3)
    (tmp_path / "s.jsonl").write_text(json.dumps({"problem": PROBLEM, "steps": STEPS}) + "\n")
    command = ["score", str(tmp_path / "s.jsonl"), "--verifier", str(folder), "--kv-gib", "0.1", "--json"]
    command += ["--results", str(tmp_path / "out.jsonl")]
    done = CliRunner().invoke(app, [*command, "--prm-base", str(folder / "base")])
    assert done.exit_code == 0, done.output
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2 and "pass as base the model" in " ".join(refused.output.split())


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("trl", "base must be None for .*, which is a whole checkpoint, got"),
        ("implicit", "base must be None for PRM family 'implicit', which is two whole models, got"),
        ("thinkprm", "base must be None for generative family 'thinkprm', got"),
    ],
)
def test_a_base_is_refused_where_nothing_needs_one(tmp_path, family, message):
    folder = write_prm(tmp_path / "m", "trl")
    with pytest.raises(ValueError, match=message):
        scores_of(folder, family=family, base=folder, **({"reference": folder} if family == "implicit" else {}))
