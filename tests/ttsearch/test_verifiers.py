"""PRM families: the ids they read, where scores are, and how a checkpoint is recognised."""

import json
import struct

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from ttsearch.prompts import STYLES, TextPolicy, detect_style
from ttsearch.verifiers import FAMILIES, TextVerifier, detect_family, get_family


def byte_tokenizer(**special):
    vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def spell(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def layout(family, tokenizer, problem, steps):
    """The whole sequence as text, and the text read up to each score."""
    verifier = TextVerifier(tokenizer, family)
    ids, scored = verifier.prompt_ids(problem), []
    for step in steps:
        new, reads = verifier.step_ids(step)
        scored += [spell(tokenizer, ids + new[: r + 1]) for r in reads]
        ids += new
    return spell(tokenizer, ids), scored


STEPS = ["one\ntwo\n\n", "\\boxed{3}"]


def test_trl_layout():
    text, scored = layout(FAMILIES["trl"], byte_tokenizer(), "1+2?", STEPS)
    assert text == "1+2?one\ntwo\n\\boxed{3}\n"
    assert scored == ["1+2?one\ntwo\n", text]


def test_trl_begins_with_bos_if_there_is_one():
    text, _ = layout(FAMILIES["trl-blank-line"], byte_tokenizer(bos_token="<s>"), "1+2?", STEPS)
    assert text == "<s>1+2?one\ntwo\n\n\\boxed{3}\n\n"


def test_a_suffix_of_several_tokens_is_read_at_its_last():
    _, scored = layout(FAMILIES["trl-blank-line"], byte_tokenizer(), "q", ["a", "b"])
    assert scored == ["qa\n\n", "qa\n\nb\n\n"]


def test_skywork_layout():
    text, scored = layout(FAMILIES["skywork"], byte_tokenizer(bos_token="<s>"), "1+2?", STEPS)
    assert text == "<s>1+2?\none two\n\\boxed{3}\n"
    assert scored == ["<s>1+2?\none two\n", text]


def test_skywork_needs_a_bos_token():
    with pytest.raises(
        ValueError, match="begins its prompt with the tokenizer's bos_token, which is None here"
    ):
        TextVerifier(byte_tokenizer(), FAMILIES["skywork"])


def test_qwen_layout():
    tokenizer = byte_tokenizer(additional_special_tokens=["<|im_start|>", "<|im_end|>", "<extra_0>"])
    text, scored = layout(FAMILIES["qwen-math-prm"], tokenizer, "1+2?", STEPS)
    assert text == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within "
        "\\boxed{}.<|im_end|>\n"
        "<|im_start|>user\n1+2?<|im_end|>\n<|im_start|>assistant\none\ntwo<extra_0>\\boxed{3}<extra_0>"
    )
    assert [s.count("<extra_0>") for s in scored] == [1, 2] and all(s.endswith("<extra_0>") for s in scored)


def test_lines_each_reads_every_line():
    _, scored = layout(get_family("trl", lines="each"), byte_tokenizer(), "q", ["a\n\nb\n\n"])
    assert scored == ["qa\n", "qa\nb\n"]


def test_positions_do_not_depend_on_the_text():
    """A problem that contains the marker adds no score."""
    tokenizer = byte_tokenizer(additional_special_tokens=["<|im_start|>", "<|im_end|>", "<extra_0>"])
    _, scored = layout(FAMILIES["qwen-math-prm"], tokenizer, "what is <extra_0>?", ["a <extra_0> b", "c"])
    assert len(scored) == 2


def test_a_problem_with_braces_is_text():
    assert layout(FAMILIES["trl"], byte_tokenizer(), "{bos} {x}?", [])[0] == "{bos} {x}?"


def test_step_without_visible_text_is_not_scored():
    assert TextVerifier(byte_tokenizer(), FAMILIES["trl"]).step_ids(" \n\n") == ([], [])


def test_length_limit():
    verifier = TextVerifier(byte_tokenizer(bos_token="<s>"), FAMILIES["skywork"], max_position=131072)
    assert verifier.max_length == 4096 and verifier.fits(4096) and not verifier.fits(4097)
    assert TextVerifier(byte_tokenizer(), FAMILIES["trl"], max_position=256).max_length == 256


def write_config(folder, **config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("Qwen2ForProcessRewardModel", "qwen-math-prm"),
        ("LlamaForTokenClassification", "trl"),
        ("Qwen2ForTokenClassification", "trl"),
    ],
)
def test_detect_by_architecture(tmp_path, architecture, name):
    assert detect_family(write_config(tmp_path / "m", architectures=[architecture])).name == name


def test_detect_by_weights(tmp_path):
    folder = write_config(tmp_path / "m", architectures=["Qwen2ForCausalLM"])
    header = json.dumps(
        {"v_head.summary.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}
    ).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert detect_family(folder).name == "skywork"


def test_detect_by_marker_file_with_one_field_changed(tmp_path):
    folder = write_config(tmp_path / "m", architectures=["LlamaForTokenClassification"])
    (folder / "ttsk_prm.json").write_text(json.dumps({"family": "trl", "suffix": "\n\n"}))
    assert detect_family(folder).suffix == "\n\n"
    (folder / "ttsk_prm.json").write_text(json.dumps({"family": "trl", "head": "value"}))
    with pytest.raises(ValueError, match=r"fields of a PRM family that may be set are .*, got \['head'\]"):
        detect_family(folder)
    assert detect_family(folder, "skywork").name == "skywork", "an explicit family wins"


def test_detect_invalid(tmp_path):
    folder = write_config(tmp_path / "m", architectures=["LlamaForCausalLM"])
    with pytest.raises(
        ValueError, match="cannot tell the PRM family of m .*LlamaForCausalLM.*--prm-family, one of trl"
    ):
        detect_family(folder)
    with pytest.raises(ValueError, match="must be one of trl, .*, got 'nope'"):
        detect_family(folder, "nope")
    with pytest.raises(ValueError, match="must have 2 labels, t has 3"):
        detect_family(
            write_config(
                tmp_path / "t", architectures=["XForTokenClassification"], id2label={0: "a", 1: "b", 2: "c"}
            )
        )
    with pytest.raises(ValueError, match="must be a folder with a config.json"):
        detect_family(tmp_path / "absent")


def test_suffix_the_tokenizer_lacks():
    core = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    with pytest.raises(ValueError, match="no token for the step suffix '<extra_0>'"):
        TextVerifier(tokenizer, FAMILIES["qwen-math-prm"])


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_policy_prompts():
    tokenizer = byte_tokenizer(eos_token="<e>")
    policy = TextPolicy(tokenizer, detect_style(tokenizer), [tokenizer.eos_token_id])
    assert policy.style.name == "plain" and spell(tokenizer, policy.prompt_ids("1+2?")) == "1+2?"
    tokenizer.chat_template = CHAT
    policy = TextPolicy(tokenizer, detect_style(tokenizer, "qwen2"), [tokenizer.eos_token_id])
    assert spell(tokenizer, policy.prompt_ids("q")) == f"<system>{STYLES['qwen'].system}<user>q<assistant>"
    assert detect_style(tokenizer, "llama", "Llama-3.2-1B-Instruct").name == "llama"
    assert detect_style(tokenizer, "qwen2", "org/DeepSeek-R1-Distill-Qwen-1.5B").name == "r1"


def test_policy_finish_reasons():
    tokenizer = byte_tokenizer(eos_token="<e>")
    policy = TextPolicy(tokenizer, "plain", [tokenizer.eos_token_id])
    eos = tokenizer.eos_token_id
    assert [policy.finish_reason(*end) for end in ((-2, eos), (-2, 5), (-1, 5), (0, 5))] == [
        "eos",
        "boxed",
        "step",
        "length",
    ]
    assert policy.decode([*tokenizer("a\n\n").input_ids, eos]) == "a\n\n"


def test_policy_prompt_invalid():
    with pytest.raises(ValueError, match="prompt style must be one of plain, qwen, llama, r1, got 'x'"):
        TextPolicy(byte_tokenizer(), "x", [])
    with pytest.raises(ValueError, match="needs a chat template"):
        TextPolicy(byte_tokenizer(), "qwen", [])
