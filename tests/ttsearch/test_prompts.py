"""What the policy reads before its first step, and how its steps end."""

import pytest
from tiny_tokenizers import bytes_only
from ttsearch.prompts import STYLES, TextPolicy, detect_style


def spell(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_policy_prompts():
    tokenizer = bytes_only(eos_token="<e>")
    policy = TextPolicy(tokenizer, detect_style(tokenizer), [tokenizer.eos_token_id])
    assert policy.style.name == "plain" and spell(tokenizer, policy.prompt_ids("1+2?")) == "1+2?"
    tokenizer.chat_template = CHAT
    policy = TextPolicy(tokenizer, detect_style(tokenizer, "qwen2"), [tokenizer.eos_token_id])
    assert spell(tokenizer, policy.prompt_ids("q")) == f"<system>{STYLES['qwen'].system}<user>q<assistant>"
    assert detect_style(tokenizer, "llama", "Llama-3.2-1B-Instruct").name == "llama"
    cached = "/hub/models--deepseek-ai--DeepSeek-R1-Distill-Qwen-1.5B/snapshots/ad9f0ae0864d7fbcd1cd905e3c6c5b069cc8b562"
    for name in ("org/DeepSeek-R1-Distill-Qwen-1.5B", "models/DeepSeek-R1-Distill-Qwen-1.5B/", "deepseek_r1.gguf", cached):
        assert detect_style(tokenizer, "qwen2", name).name == "r1"
    assert detect_style(tokenizer, "qwen2", "org/Qwen2.5-r16").name == "qwen"


def test_policy_finish_reasons():
    tokenizer = bytes_only(eos_token="<e>")
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
        TextPolicy(bytes_only(), "x", [])
    with pytest.raises(ValueError, match="needs a chat template"):
        TextPolicy(bytes_only(), "qwen", [])
