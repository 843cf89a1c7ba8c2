"""The compiled stop table against a slow scan of the text, over random token sequences."""

import random
import time

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from ttsearch.answers import BOX, box_end
from ttsearch.stops import SOLUTION_ENDED, STEP_ENDED, build_table, compile_stops
from ttsearch.tokens import token_bytes

PIECES = ["\n\n", "\n", ".\n\n", "\n\n\n", ".\n\nSo", " \n", "\\", "boxed", "\\boxed", "\\boxed{", "{", "}",
          "ed{", "\\bo", "x", "}$.", "}}", "1}", "\\{", "\\}", "a", " ", "{2",
          "\n\\boxed{3}", "}\n\n", ".\n\n\\boxed{4}", "x\n\n\\boxed{"]  # fmt: skip
EOS = len(PIECES)


def slow_scan(text: str) -> int:
    """Definition: a box closed before a blank line ends the solution, a blank line behind text the step."""
    ended, i = False, 0
    while i < len(text):
        if text.startswith(BOX, i):
            end, blank = box_end(text, i + len(BOX)), text.find("\n\n", i)
            if end is not None and (blank < 0 or end <= blank):
                return SOLUTION_ENDED
            if blank < 0:
                break
            i = blank
        if text.startswith("\n\n", i) and text[:i].strip():
            ended = True
        i += 1
    return STEP_ENDED if ended else 0


@pytest.fixture(scope="module")
def table():
    return build_table([piece.encode() for piece in PIECES] + [b""], [EOS])


@pytest.mark.parametrize("seed", range(20))
def test_random_ids_match_the_scan(table, seed):
    rng = random.Random(seed)
    for _ in range(300):
        state, text = 0, ""
        for _ in range(rng.randint(1, 14)):
            token = rng.randrange(len(PIECES))
            text += PIECES[token]
            state = int(table[state, token])
            expected = slow_scan(text)
            assert (state if state < 0 else 0) == expected, repr(text)
            if state < 0:
                break


def run(table, ids):
    state = 0
    for i in ids:
        state = int(table[state, i])
        if state < 0:
            return state
    return state


def ids_of(*pieces):
    return [PIECES.index(piece) for piece in pieces]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["a", ".\n\n"], STEP_ENDED),
        (["a", "\n", "\n"], STEP_ENDED),
        (["a", " \n", "\n"], STEP_ENDED),
        (["a", ".\n\nSo"], STEP_ENDED),
        (["\\boxed{", "x", "\n\n"], STEP_ENDED),
        (["a", ".\n\n\\boxed{4}"], SOLUTION_ENDED),
        (["\\", "boxed", "{", "1}"], SOLUTION_ENDED),
        (["\\boxed{", "{2", "}}"], SOLUTION_ENDED),
        (["\\boxed{", "\\{", "}"], SOLUTION_ENDED),
        (["\n\\boxed{3}"], SOLUTION_ENDED),
    ],
)
def test_ends(table, pieces, expected):
    assert run(table, ids_of(*pieces)) == expected


@pytest.mark.parametrize(
    "pieces",
    [["\n\n"], ["\n\n", "\n\n\n"], ["\\boxed{", "\\}"], ["a", "\n", "a", "\n"]],
)
def test_goes_on(table, pieces):
    assert run(table, ids_of(*pieces)) >= 0


def test_eos_ends_the_solution_from_every_state(table):
    assert (table[:, EOS] == SOLUTION_ENDED).all()
    assert table.dtype == np.int32 and table[0, PIECES.index("a")] >= 0


def test_deep_boxes_are_given_up():
    table = build_table([b"\\boxed{", b"{", b"}"], [])
    assert run(table, [0, *[1] * 7, *[2] * 8]) == SOLUTION_ENDED
    assert run(table, [0, *[1] * 8, *[2] * 9]) >= 0


def test_other_delimiters():
    table = build_table([b"a", "ки".encode(), "к".encode(), "и".encode()], [], ["ки"])
    assert [run(table, ids) for ids in ([0, 1], [0, 2, 3])] == [STEP_ENDED, STEP_ENDED]
    assert run(table, [0, 2, 0, 3]) >= 0


def test_a_box_may_be_text_like_any_other():
    table = build_table([b"\\boxed{", b"x", b"}", b"</think>", b"."], [4], ["</think>", "Step 2:"], boxes=False)
    assert run(table, [0, 1, 2, 0]) >= 0 and run(table, [0, 1, 2, 3]) == STEP_ENDED
    assert run(table, [0, 4]) == SOLUTION_ENDED


def test_invalid():
    with pytest.raises(ValueError, match="delimiters must be non-empty"):
        build_table([b"a"], [], [""])
    with pytest.raises(ValueError, match=r"eos_ids must lie in \[0, 1\), got 7"):
        build_table([b"a"], [7])


def byte_level_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "ĊĊ", ".ĊĊ", "Ġthe", "bo", "xed"])}
    core = Tokenizer(models.BPE(vocab, [("Ċ", "Ċ"), (".", "ĊĊ"), ("b", "o")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", additional_special_tokens=["<extra>"]
    )


def byte_fallback_tokenizer():
    pieces = [
        "<unk>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        "▁the",
        "\\",
        "boxed",
        "{",
        "}",
        "é",
        "▁▁",
    ]
    core = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>")
    )
    core.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    ])  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


def char_tokenizer():
    tokens = ["<pad>", "<eos>", "\n\n", "\\boxed{", "}", *"0123456789+="]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n\n|\\boxed\{|[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


@pytest.mark.parametrize("make", [byte_level_tokenizer, byte_fallback_tokenizer, char_tokenizer])
def test_token_bytes_agree_with_decode(make):
    tokenizer, rng = make(), random.Random(0)
    table = token_bytes(tokenizer)
    plain = [i for i in range(len(table)) if table[i]]
    anchor = next(i for i in plain if table[i] in (b"1", b"\\"))  # decoders may strip a leading space
    for _ in range(200):
        ids = [anchor, *rng.choices(plain, k=8), anchor]
        expected = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        joined = b"".join(table[i] for i in ids)
        try:
            assert joined.decode() == expected
        except UnicodeDecodeError:
            continue  # a lone byte: decode shows replacement characters, by rules of its own


@pytest.mark.parametrize("make", [byte_level_tokenizer, byte_fallback_tokenizer, char_tokenizer])
def test_compile_stops(make):
    tokenizer = make()
    eos = tokenizer.eos_token_id
    table = compile_stops(tokenizer, [eos], vocab_size=600)
    assert table.shape[1] == 600 and (table[:, eos] == SOLUTION_ENDED).all()
    assert (table[0, 500:] == 0).all(), "ids beyond the tokenizer leave the state alone"
    ids = tokenizer("1+1=2\n\n", add_special_tokens=False).input_ids
    assert run(table, ids) == STEP_ENDED
    assert run(table, tokenizer("\\boxed{2}", add_special_tokens=False).input_ids) == SOLUTION_ENDED
    assert compile_stops(make(), [eos], vocab_size=600) is table, "the same vocabulary is compiled once"
    assert not table.flags.writeable


def test_unknown_decoder_is_named():
    core = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    core.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match=r"its decoder is \['WordPiece'\]"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=core))


def test_large_vocabulary_is_quick():
    rng = random.Random(1)
    alphabet = "abcdefghijklmnopqrstuvwxyz \n\\{}.$"
    vocabulary = ["".join(rng.choices(alphabet, k=rng.randint(1, 9))).encode() for _ in range(150_000)]
    start = time.perf_counter()
    table = build_table(vocabulary, [0])
    print(f"{table.shape} in {time.perf_counter() - start:.2f} s")
    assert table.shape[1] == 150_000 and table.shape[0] < 60
