"""Small tokenizers that behave like the real ones: byte-level BPE of Qwen 2.5 and Llama 3, SentencePiece BPE of Mistral."""

from __future__ import annotations

import functools
import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT, LLAMA3_SPLIT = SPLIT.replace("DIGITS", r"\p{N}"), SPLIT.replace("DIGITS", r"\p{N}{1,3}")
QWEN_CHAT = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role != 'system' %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
LLAMA3_CHAT = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content']|trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}{{- 'Cutting Knowledge Date: December 2023\\n' }}"
    "{{- 'Today Date: ' + date_string + '\\n\\n' }}{{- system }}{{- '<|eot_id|>' }}"
    "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_0|>"]
WORDS = "step Step problem answer equals therefore so the sum of is we add get then system user assistant Date Today Question"
LINES = [f"{a} {b}: 1 + {i} = 2. {b} {a} - {i}" for i, a in enumerate(WORDS.split()) for b in WORDS.split()]


def byte_level(split: str, special: list[str], bos: str | None, chat: str | None) -> PreTrainedTokenizerFast:
    """Merges of newlines with what stands before them, markers of blank lines, ` ки` and ` +` as the real ones have."""
    corpus = [*LINES, *("so.\nso.\n\nstep 2:\n\nx =\n" * 3 for _ in range(9))]
    corpus += [f"a{marker}" for marker in (" \n\n\n\n", " \n\n\n\n\n", "\n\n\n\n", " ки", "ки", " и", " + -") for _ in range(99)]
    core = Tokenizer(models.BPE(ignore_merges=split is LLAMA3_SPLIT))
    core.pre_tokenizer = byte_level_splitter(split)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=480, initial_alphabet=alphabet, show_progress=False))
    finish_byte_level(core, split, special, bos)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=special[-1], pad_token=special[-1])
    wrapped.chat_template = chat
    return wrapped


def byte_level_splitter(split: str):
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), byte])


def finish_byte_level(core: Tokenizer, split: str, special: list[str], bos: str | None) -> Tokenizer:
    core.pre_tokenizer, core.decoder = byte_level_splitter(split), decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if split is QWEN_SPLIT:
        core.normalizer = normalizers.NFC()
    if bos:
        core.post_processor = begins_with(bos, core.token_to_id(bos))
    return core


def begins_with(bos: str, token: int):
    return processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, token)])


def sentencepiece_bpe(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """`vocab` holds <unk>, <s>, </s> and a token of every byte."""
    core = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spaces = decoders.Replace("▁", " ")
    core.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    core.post_processor = begins_with("<s>", vocab["<s>"])
    return core


@functools.cache
def qwen(bos: str | None = None, *more: str) -> PreTrainedTokenizerFast:
    """Qwen 2.5: no token of its own in front of a text, not even a given `bos`; `more` special tokens."""
    made = byte_level(QWEN_SPLIT, ["<|im_start|>", "<|im_end|>", "<|vision_start|>", *more, "<|endoftext|>"], None, QWEN_CHAT)
    if bos:
        made.bos_token = bos
    return made


@functools.cache
def llama3() -> PreTrainedTokenizerFast:
    return byte_level(LLAMA3_SPLIT, LLAMA3_SPECIAL, LLAMA3_SPECIAL[0], LLAMA3_CHAT)


@functools.cache
def deepseek() -> PreTrainedTokenizerFast:
    """deepseek-math with PQM's [PRM] added."""
    return byte_level(QWEN_SPLIT, ["<bos>", "[PRM]", "<eos>"], "<bos>", None)


@functools.cache
def mistral(pad: str = "</s>") -> PreTrainedTokenizerFast:
    """Llama 2 and Mistral: spaces are ▁, one is put in front of every piece of text, bytes stand for what is unknown."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    corpus = [*LINES, *["x ки y и z + - 1"] * 99]
    learned.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=220, show_progress=False))
    model = json.loads(learned.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    core = sentencepiece_bpe({piece: i for i, piece in enumerate(names)}, [tuple(merge) for merge in model["merges"]])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token=pad
    )


def bytes_only(**special) -> PreTrainedTokenizerFast:
    """One token a byte."""
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)
