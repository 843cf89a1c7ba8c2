"""The registry: families by name and from a user's file, and how a checkpoint is recognised."""

import json
import re
import shutil

import pytest
import torch
from prm_checkpoints import write_causal_lm, write_math_psa
from prm_models import LAYOUTS, tokenizer_of, write_prm
from safetensors.torch import save_file
from tiny_tokenizers import bytes_only
from ttsearch.tokenizer import load_tokenizer
from ttsearch.verifiers import FAMILIES, GENERATIVE, PrmFamily, TextVerifier, detect_family, get_family

MINE = {"name": "mine", "prompt": "Q: {problem}\n", "suffix": "\n", "bos": "never", "mix": [0, 1]}

CHAT = {"layout": "chat", "prompt": "{problem}"}
EVERY = {"layout": "chat", "prompt": "{problem}", "turns": [["user", "{problem}"]], "read": "every token"}
DIALOGUE = {"layout": "dialogue", "prompt": "{problem}", "suffix": "", "turns": [["user", "{problem} {step}"]]}


def test_every_family_names_its_source():
    assert all(family.source for family in [*FAMILIES.values(), *GENERATIVE.values()])
    assert {f.name for f in FAMILIES.values() if not f.mix} == {"implicit", "judge"}
    assert {f.name for f in FAMILIES.values() if f.unbounded} == {"pqm", "pure", "mathminos", "implicit"}
    assert {f.name: f.max_length for f in FAMILIES.values() if f.max_length} == {"skywork": 4096, "qwen-math-prm": 4096}


def test_fields_may_be_replaced():
    assert get_family("trl", suffix="\n\n", lines="each").suffix == "\n\n"
    assert get_family(FAMILIES["trl"]) is not None and get_family(FAMILIES["trl"], mix=[1, 0]).mix == (1, 0)
    with pytest.raises(ValueError, match=r"fields of a PRM family are name, source, .*, got \['head'\]"):
        get_family("trl", head="value")
    with pytest.raises(ValueError, match="PRM family must be one of math-shepherd, .*, or a .json or .py file .*, got 'nope'"):
        get_family("nope")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "prose"}, "layout must be 'text' or 'chat' or 'dialogue' or 'question', got 'prose'"),
        ({"mix": ["a"]}, r"mix must be tuple\[float, ...\], got \('a',\)"),
        ({"prompt": "Q:"}, "prompt must hold {problem}, got 'Q:'"),
        ({"turns": [["user"]]}, "turns must be tuple.*got"),
        ({"max_length": True}, "max_length must be int | None, got True"),
        ({"read_offset": "1"}, "read_offset must be int, got '1'"),
        ({"ids": ["+"]}, r"ids must be Mapping\[str, int\]"),
        ({"step": "{n}"}, "step must hold {step}, got '{n}'"),
        ({"rows": ["+"], "mix": []}, r"mix must have one number per row, got \(\) for rows \('\+',\)"),
        ({"rows": ["+", "+"], "mix": [0, 1]}, "rows must be distinct"),
        ({"rows": ["+", "-"], "mix": [0, 1], "vocab_mean": True}, "rows and vocab_mean exclude each other"),
        ({"turns": [["user", "{problem}"]]}, "turns is of layout 'chat' or 'dialogue' or 'question', not 'text'"),
        ({"layout": "chat"}, "prompt is of layout 'text', not 'chat'"),
        (CHAT, "turns must hold {problem}, got ''"),
        (DIALOGUE | {"suffix": "\n"}, "suffix is of layout 'text' or 'chat' or 'question', not 'dialogue'"),
        (DIALOGUE, "next_turns must hold {step}"),
        (DIALOGUE | {"next_turns": [["user", "{step}"]]}, "layout 'dialogue' needs a reply"),
        (CHAT | {"layout": "question", "turns": [["user", "{problem}"]]}, "turns must hold {solution}"),
        (
            CHAT | {"layout": "question", "turns": [["user", "{problem} {solution}"]], "tokenise": "step"},
            "tokenise must be 'whole' with layout 'question', got 'step'",
        ),
        ({"read": "every token"}, "read 'every token' needs layout 'chat' and tokenise 'whole'"),
        (EVERY | {"mix": [1]}, "read 'every token' has no head; leave out mix"),
        ({"scale": 2.0}, "scale is of read 'every token', not 'suffix'"),
        ({"answers": [["Yes"]], "mix": []}, "answers must be two groups of spellings, .*, got"),
        ({"answers": [["Yes"], ["No"]]}, "answers must be two groups of spellings, without rows, vocab_mean, mix or squash"),
    ],
)
def test_a_family_that_does_not_fit(tmp_path, changes, message):
    (tmp_path / "mine.json").write_text(json.dumps(MINE | changes))
    with pytest.raises(ValueError, match=f"PRM family 'mine': {message}"):
        get_family(tmp_path / "mine.json")


def test_a_family_needs_a_name():
    with pytest.raises(ValueError, match="a PRM family must have a name"):
        PrmFamily(name="")


def test_a_family_in_a_file(tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps(MINE))
    family = get_family(str(tmp_path / "mine.json"))
    assert family.name == "mine" and family.mix == (0, 1)
    assert TextVerifier(bytes_only(), family).extend(TextVerifier(bytes_only(), family).start("q"), ["a"]).reads == [1]
    (tmp_path / "like.json").write_text(json.dumps({"family": "math-shepherd", "step": "Step {n}: {step}"}))
    assert get_family(tmp_path / "like.json").step == "Step {n}: {step}"
    (tmp_path / "mine.py").write_text(
        "from ttsearch.verifiers import PrmFamily\nFAMILY = PrmFamily(name='coded', suffix='!', mix=(0, 1))\n"
    )
    assert detect_family(tmp_path, tmp_path / "mine.py").name == "coded"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.json", "{", "a.json must be JSON with the fields of a PRM family"),
        ("a.json", "[1]", 'a.json must be an object with a "family" to start from or a "name" of its own'),
        ("a.json", '{"suffix": "x"}', 'a.json must be an object with a "family" to start from or a "name" of its own'),
        ("a.json", '{"name": "x", "sufix": "x"}', r"a.json: fields of a PRM family are .*, got \['sufix'\]"),
        ("a.json", '{"family": "nope"}', "got 'nope'"),
        ("a.json", '{"family": 3}', "a PRM family must be a name, a file or a PrmFamily, got 3"),
        ("a.json", '{"family": null}', "a PRM family must be a name, a file or a PrmFamily, got None"),
        ("a.json", '{"family": "a.json"}', 'a.json starts from itself; its "family" must be another one'),
        ("a.py", "x = 1", "a.py must set FAMILY to a PrmFamily, got None"),
    ],
)
def test_a_file_that_does_not_describe_a_family(tmp_path, file, content, message):
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        get_family(tmp_path / file)
    with pytest.raises(ValueError, match="PRM family file .*absent.json does not exist"):
        get_family(tmp_path / "absent.json")


def write_config(folder, **config):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"model.norm.weight": torch.ones(1)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("name", "architecture", "family"),
    [
        ("math-shepherd-mistral-7b-prm", "MistralForCausalLM", "math-shepherd"),
        ("Llama3.1-8B-PRM-Mistral-Data", "LlamaForCausalLM", "rlhflow-mistral"),
        ("Llama3.1-8B-PRM-Deepseek-Data", "LlamaForCausalLM", "rlhflow-deepseek"),
        ("Llama3.1-Math-PRM", "LlamaForCausalLM", "er-prm"),
        ("ER-PRM", "LlamaForCausalLM", "er-prm"),
        ("llama-ER-PRM-v2", "LlamaForCausalLM", "er-prm"),
        ("rebase-34b", "LlamaForCausalLM", "rebase"),
        ("VersaPRM", "LlamaForCausalLM", "versaprm"),
        ("VersaPRM-Base-3B", "LlamaForCausalLM", "versaprm"),
        ("Llama-PRM800K", "LlamaForCausalLM", "versaprm"),
        ("Qwen-PRM800K", "Qwen2ForCausalLM", "versaprm-qwen"),
        ("llemma-7b-prm-prm800k-level-1to3-hf", "LlamaForCausalLM", "llemma"),
        ("PURE-PRM-7B", "Qwen2ForTokenClassification", "pure"),
        ("Qwen2-0.5B-Reward-Math-Sheperd", "Qwen2ForTokenClassification", "trl"),
        ("Qwen2.5-0.5B-Math-Shepherd-PRM-0.2", "Qwen2ForTokenClassification", "trl"),
        ("anything", "LlamaForTokenClassification", "trl"),
        ("Qwen2.5-Math-PRM-7B", "Qwen2ForProcessRewardModel", "qwen-math-prm"),
        ("Qwen2.5-Math-7B-PRM800K", "Qwen2ForProcessRewardModel", "qwen-math-prm"),
    ],
)
def test_detect_by_name_and_architecture(tmp_path, name, architecture, family):
    assert detect_family(write_config(tmp_path / name, architectures=[architecture])).name == family
    cached = tmp_path / f"models--owner--{name}" / "snapshots" / "0123"
    assert detect_family(write_config(cached, architectures=[architecture])).name == family
    assert detect_family(write_config(tmp_path / "x", architectures=[architecture]), source=f"owner/{name}").name == family


@pytest.mark.parametrize(
    "name", ["llama3-8b-verifier-prm", "my-better-prm", "reader-prm-v2", "transformer-prm", "rebased-llama", "llama-terminos"]
)
def test_a_name_that_only_ends_alike_says_nothing(tmp_path, name):
    architecture = "MistralForTokenClassification" if name.endswith("minos") else "LlamaForCausalLM"
    folder = write_config(tmp_path / name, architectures=[architecture], id2label={0: "a"})
    with pytest.raises(ValueError, match=f"cannot tell the PRM family of {name}"):
        detect_family(folder)


@pytest.mark.parametrize("family", ["skywork", "pqm", "qwen-math-prm", "trl",  "reasoneval-7b", "reasoneval-34b"])
def test_detect_by_files_alone(tmp_path, family):
    assert detect_family(write_prm(tmp_path / "m", family)).name == family


def test_a_value_head_beside_a_language_model(tmp_path):
    folder = write_config(tmp_path / "m", architectures=["Qwen2ForCausalLM"])
    save_file({"v_head.summary.weight": torch.zeros(1, 2)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="one of skywork, pqm, or a file"):
        detect_family(folder)
    assert detect_family(folder, source="owner/Skywork-o1-Open-PRM").name == "skywork"
    (folder / "added_tokens.json").write_text('{"[PRM]": 7}')
    assert detect_family(folder).name == "pqm"
    (folder / "added_tokens.json").write_text("{}")
    assert detect_family(folder).name == "skywork"
    (folder / "added_tokens.json").unlink()
    (folder / "config.json").unlink()
    assert detect_family(folder).name == "pqm", "weights without a config.json"


def test_an_adapter_has_its_bases_tokenizer(tmp_path):
    folder = write_prm(tmp_path / "Math-psa", "math-psa")
    assert detect_family(folder).name == "math-psa"
    for file in folder.glob("*token*"):
        file.rename(folder / "base" / file.name)
    assert load_tokenizer(folder).get_vocab() == tokenizer_of("math-psa").get_vocab()
    shutil.rmtree(folder / "base")
    with pytest.raises(ValueError, match="cannot load a tokenizer from .*base"):
        load_tokenizer(folder)


def test_detect_by_marker_file_with_one_field_changed(tmp_path):
    folder = write_config(tmp_path / "m", architectures=["LlamaForTokenClassification"])
    (folder / "ttsk_prm.json").write_text(json.dumps({"family": "trl", "suffix": "\n\n"}))
    assert detect_family(folder).suffix == "\n\n"
    (folder / "ttsk_prm.json").write_text(json.dumps({"family": "trl", "head": "value"}))
    with pytest.raises(ValueError, match=r"ttsk_prm.json: fields of a PRM family are .*, got \['head'\]"):
        detect_family(folder)
    assert detect_family(folder, "skywork").name == "skywork", "an explicit family wins"
    (folder / "ttsk_prm.json").write_text(json.dumps({"family": "mine.json", "suffix": "!"}))
    (folder / "mine.json").write_text(json.dumps(MINE))
    assert (detect_family(folder).name, detect_family(folder).suffix) == ("mine", "!"), "a file beside it"


def test_an_ambiguous_checkpoint_lists_what_it_may_be(tmp_path):
    folder = write_config(tmp_path / "m", architectures=["LlamaForCausalLM"])
    with pytest.raises(ValueError) as refused:
        detect_family(folder)
    plain = [name for name, layout in LAYOUTS.items() if layout.write in (write_causal_lm, write_math_psa)]
    listed = ", ".join(name for name in FAMILIES if name in [*plain, "implicit", "judge"])
    said = f"cannot tell the PRM family of m (LlamaForCausalLM); pass --prm-family, one of {listed}, or a file"
    assert said in str(refused.value)
    write_config(tmp_path / "t", architectures=["XForTokenClassification"], id2label={0: "a", 1: "b", 2: "c"})
    with pytest.raises(ValueError, match=r"family of t \(XForTokenClassification with 3 labels\)"):
        detect_family(tmp_path / "t")
    with pytest.raises(ValueError, match=r"family of n \(no architecture\)"):
        detect_family(write_config(tmp_path / "n"))
    with pytest.raises(ValueError, match="verifier must be a folder with a checkpoint: .*absent must hold one of"):
        detect_family(tmp_path / "absent")


@pytest.mark.parametrize("name", ["Gen-Verse/ReasonFlux-PRM-7B", "Babelscape/Llama-3.1-8B-PRM800k-r"])
def test_what_cannot_be_checked_is_refused_by_name(tmp_path, name):
    folder = write_config(tmp_path / "m", architectures=["LlamaForCausalLM"])
    with pytest.raises(ValueError, match=f"{re.escape(name)}.* is not supported: "):
        detect_family(folder, source=name)
    cached = tmp_path / ("models--" + name.replace("/", "--")) / "snapshots" / "1"
    with pytest.raises(ValueError, match="is not supported: "):
        detect_family(write_config(cached, architectures=["LlamaForCausalLM"]))
