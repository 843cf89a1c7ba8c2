"""The ids a verifier reads and the positions of its scores: layouts, rollback, what is refused."""

import pytest
import tiny_tokenizers
from tiny_tokenizers import bytes_only, deepseek, llama3, mistral, qwen
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from ttsearch.verifiers import FAMILIES, PrmFamily, TextVerifier, get_family
from ttsearch.verifiers.render import clean

STEPS = ["one\ntwo\n\n", "\\boxed{3}"]


def spell(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def layout(family, tokenizer, problem, steps):
    """The whole sequence as text, and the text read up to each score."""
    verifier = TextVerifier(tokenizer, family)
    path = verifier.start(problem)
    new = verifier.extend(path, steps) if steps else None
    ids = list(new.path.ids) if new else list(path.ids)
    reads = [new.keep + read for read in new.reads] if new else []
    return spell(tokenizer, ids), [spell(tokenizer, ids[: read + 1]) for read in reads]


def test_trl():
    text, scored = layout(FAMILIES["trl"], bytes_only(), "1+2?", STEPS)
    assert text == "1+2?one\ntwo\n\\boxed{3}\n"
    assert scored == ["1+2?one\ntwo\n", text]


def test_trl_begins_with_bos_if_there_is_one():
    text, _ = layout(FAMILIES["trl-blank-line"], bytes_only(bos_token="<s>"), "1+2?", STEPS)
    assert text == "<s>1+2?one\ntwo\n\n\\boxed{3}\n\n"


def test_a_suffix_of_several_tokens_is_read_at_its_last():
    _, scored = layout(FAMILIES["trl-blank-line"], bytes_only(), "q", ["a", "b"])
    assert scored == ["qa\n\n", "qa\n\nb\n\n"]


def test_skywork_joins_the_lines_of_a_step():
    text, scored = layout(FAMILIES["skywork"], bytes_only(bos_token="<s>"), "1+2?", STEPS)
    assert text == "<s>1+2?\none two\n\\boxed{3}\n"
    assert scored == ["<s>1+2?\none two\n", text]


def test_every_line_may_be_read():
    verifier = TextVerifier(bytes_only(), get_family("trl", lines="each"))
    new = verifier.extend(verifier.start("q"), ["a\n\nb\n\n", "c"])
    assert new.owner == [0, 0, 1]
    assert layout(verifier.family, bytes_only(), "q", ["a\n\nb\n\n"])[1] == ["qa\n", "qa\nb\n"]


def test_qwen_math():
    text, scored = layout(FAMILIES["qwen-math-prm"], qwen(None, "<extra_0>"), "1+2?", STEPS)
    assert text == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\n1+2?<|im_end|>\n<|im_start|>assistant\none\ntwo<extra_0>\\boxed{3}<extra_0>"
    )
    assert [s.count("<extra_0>") for s in scored] == [1, 2] and all(s.endswith("<extra_0>") for s in scored)


def test_rlhflow_is_read_before_the_answer_and_carries_it():
    text, scored = layout(FAMILIES["rlhflow-mistral"], llama3(), "1+2?", STEPS)
    first = (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n1+2? one\ntwo<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    second = (
        "+<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n\\boxed{3}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert scored == [first, first + second] and text == first + second


def test_rlhflow_appends_the_answer_with_the_next_step():
    verifier = TextVerifier(llama3(), FAMILIES["rlhflow-deepseek"])
    one = verifier.extend(verifier.start("q"), ["a"])
    two = verifier.extend(one.path, ["b"])
    assert two.keep == len(one.path.ids) and two.ids[0] == 10 and two.reads == [len(two.ids) - 1]


def test_a_chat_template_with_todays_date_gets_a_fixed_one():
    """Llama 3.2's template asks the clock where no date is given."""
    tokenizer = tiny_tokenizers.byte_level(
        tiny_tokenizers.LLAMA3_SPLIT, tiny_tokenizers.LLAMA3_SPECIAL, "<|begin_of_text|>",
        tiny_tokenizers.LLAMA3_CHAT.replace("'26 Jul 2024'", "strftime_now('%d %b %Y')"),
    )  # fmt: skip
    assert "Today Date: 26 Jul 2024" in layout(FAMILIES["rlhflow-mistral"], tokenizer, "q", ["a"])[0]


def test_pqm_numbers_its_steps():
    text, _ = layout(FAMILIES["pqm"], deepseek(), "q", ["step 7: a", "b"])
    assert text.endswith("### Response: Let's think step by step\nStep 1: a [PRM]\nStep 2: b [PRM]")


@pytest.mark.parametrize(("size", "end"), [("34b", "a + 1"), ("7b", "a +")])
def test_reasoneval_keeps_no_separator(size, end):
    _, scored = layout(FAMILIES[f"reasoneval-{size}"], mistral("<s>"), "q", ["a + 1", "1 + 1"])
    assert scored[0].endswith(end)


def test_a_read_that_the_parent_has_is_read_again():
    """ReasonEval-7B reads the token before the last: that of a step of one token is the step's before."""
    verifier = TextVerifier(mistral("<s>"), FAMILIES["reasoneval-7b"])
    one = verifier.extend(verifier.start("q"), ["so the sum"])
    two = verifier.extend(one.path, ["x"])
    assert two.keep == len(one.path.ids) - 1 and two.reads == [0] and two.ids == list(two.path.ids[-2:])


def test_a_whole_text_keeps_the_longest_common_beginning():
    """Llama 3 makes one token of ".\\n\\n", so the last token of a step changes when the next one comes."""
    family = PrmFamily(name="mine", prompt="{problem}\n", between="\n\n", bos="tokenizer", mix=(1,), squash="none")
    verifier = TextVerifier(llama3(), family)
    one = verifier.extend(verifier.start("q"), ["a."])
    two = verifier.extend(one.path, ["b"])
    assert two.keep == len(one.path.ids) - 1
    assert [*one.path.ids[: two.keep], *two.ids] == list(two.path.ids) == llama3()("q\na.\n\nb").input_ids
    assert two.reads == [len(two.ids) - 1] and two.length == len(two.path.ids)


def test_a_question_behind_the_solution():
    """A judge: the question moves behind the next step, so only the last step of a call is read."""
    family = PrmFamily(
        name="judge", layout="question", turns=(("user", "{problem}\n{solution}\nRight?"),), closing="So:", between="\n",
        rows=("+", "-"), mix=(1, 0),
    )  # fmt: skip
    verifier = TextVerifier(qwen(), family)
    assert verifier.stepwise
    one = verifier.extend(verifier.start("q"), ["a"])
    two = verifier.extend(one.path, ["b", "c"])
    assert spell(qwen(), two.path.ids).endswith("user\nq\na\nb\nc\nRight?<|im_end|>\n<|im_start|>assistant\nSo:")
    assert spell(qwen(), one.path.ids[: two.keep]).endswith("user\nq\na\n")
    assert two.owner == [1] and two.reads == [len(two.ids) - 1]


def test_every_token_of_the_turn_is_read_where_it_is_predicted():
    family = PrmFamily(name="implicit", layout="chat", turns=(("user", "{problem}"),), between="\n\n", read="every token")
    verifier = TextVerifier(qwen(), family)
    assert verifier.head is None and verifier.stepwise
    start = verifier.start("q")
    assert spell(qwen(), start.ids).endswith("<|im_start|>assistant\n")
    one = verifier.extend(start, ["a. b."])
    assert spell(qwen(), one.targets) == "a. b.<|im_end|>", "the end of the turn is read, too"
    assert one.keep == len(start.ids) and spell(qwen(), one.ids) == "a. b.", "and not kept"
    assert one.reads == list(range(-1, len(one.ids))), "the first token is predicted at the last one before it"
    two = verifier.extend(one.path, ["c"])
    assert spell(qwen(), two.targets) == ".\n\nc<|im_end|>", "the full stop became another token"
    assert two.keep == len(one.path.ids) - 1 and two.reads[0] == -1 and two.owner == [0] * len(two.reads)
    assert list(two.path.ids) + two.targets[-1:] == qwen().encode(spell(qwen(), start.ids) + "a. b.\n\nc<|im_end|>")


def test_markers_in_the_problem_or_a_step_add_no_score():
    for name, tokenizer, marker in (
        ("qwen-math-prm", qwen(None, "<extra_0>"), "<extra_0>"),
        ("math-shepherd", mistral(), "ки"),
        ("er-prm", llama3(), "ки"),
        ("versaprm", llama3(), "\n\n\n\n"),
        ("pqm", deepseek(), "[PRM]"),
        ("llemma", mistral(), "\n\n"),
    ):
        problem, steps = f"is {marker} this {marker} right?", [f"a {marker} b", "c", f"d {marker} e"]
        verifier = TextVerifier(tokenizer, FAMILIES[name])
        new = verifier.extend(verifier.start(problem), steps)
        marked = spell(tokenizer, new.path.ids).count(marker)
        assert marked > len(new.reads) == 3, name
        one = verifier.extend(verifier.start(problem), steps[:1])
        assert new.keep + new.reads[0] == one.keep + one.reads[0], "the first score is where it was without the others"


def test_what_is_no_utf8_is_replaced():
    text, scored = layout(FAMILIES["trl"], bytes_only(), "q\ud83d", ["x \ud83d", "y \udc80"])
    assert text == "q\ufffdx \ufffd\ny \ufffd\n" == scored[1]
    assert clean("a é 😀 \udcc3\udca9") == "a é 😀 é", "bytes that a cut left stay one character"
    for name, tokenizer in (("math-shepherd", mistral()), ("rlhflow-mistral", llama3()), ("implicit", qwen())):
        text, _ = layout(FAMILIES[name], tokenizer, "q\udfff", ["x \ud83d"])
        assert "x \ufffd" in text and "q\ufffd" in text


@pytest.mark.parametrize(("name", "tokenizer"), [("versaprm", llama3()), ("versaprm-qwen", qwen())])
def test_versaprm_strips_the_problem(name, tokenizer):
    assert layout(FAMILIES[name], tokenizer, " q\n", ["a"]) == layout(FAMILIES[name], tokenizer, "q", ["a"])
    assert layout(FAMILIES["er-prm"], llama3(), "q\n", ["a"]) != layout(FAMILIES["er-prm"], llama3(), "q", ["a"])


def test_a_problem_with_braces_is_text():
    assert layout(FAMILIES["trl"], bytes_only(), "{bos} {problem} {x}?", [])[0] == "{bos} {problem} {x}?"
    assert layout(FAMILIES["pqm"], deepseek(), "{step}{n}", ["{n} {problem}"])[0].endswith("Step 1: {n} {problem} [PRM]")


@pytest.mark.parametrize("name", ["trl", "er-prm"])
def test_a_step_without_visible_text_is_not_scored(name):
    verifier = TextVerifier(llama3(), FAMILIES[name])
    start = verifier.start("q")
    nothing = verifier.extend(start, [" \n\n"])
    assert (nothing.ids, nothing.reads, nothing.owner, nothing.keep) == ([], [], [], len(start.ids))
    assert nothing.path.steps == (" \n\n",) and nothing.path.ids == start.ids
    some = verifier.extend(nothing.path, ["", "a", "\n"])
    assert some.owner == [1] and some.path.ids == verifier.extend(start, ["a"]).path.ids


def test_no_steps_are_refused():
    verifier = TextVerifier(bytes_only(), FAMILIES["trl"])
    for steps in ([], "a step"):
        with pytest.raises(ValueError, match="steps must be a sequence of at least one step, got"):
            verifier.extend(verifier.start("q"), steps)


def test_length_limit():
    verifier = TextVerifier(bytes_only(bos_token="<s>"), FAMILIES["skywork"], max_position=131072)
    assert verifier.max_length == 4096 and verifier.fits(4096) and not verifier.fits(4097)
    assert TextVerifier(bytes_only(), FAMILIES["trl"], max_position=256).max_length == 256
    new = verifier.extend(verifier.start("q"), ["x" * 5000])
    assert new.length > 5000 and not verifier.fits(new.length), "refused, never cut"
    assert TextVerifier(bytes_only(), FAMILIES["trl"]).fits(10**9)


def test_heads():
    head = TextVerifier(llama3(), FAMILIES["versaprm"]).head
    assert (head.rows, head.squash, head.mix) == ((12, 10), "softmax", (0, 1))
    assert TextVerifier(mistral(), FAMILIES["llemma"]).head.vocab_mean
    assert TextVerifier(bytes_only(), FAMILIES["pure"]).head.mix == (-1, 1)
    assert len(TextVerifier(mistral(), FAMILIES["math-shepherd"]).head.rows) == 2


@pytest.mark.parametrize(
    ("family", "tokenizer", "message"),
    [
        ("skywork", qwen(), "begins its text with the tokenizer's bos_token, which is None here"),
        ("qwen-math-prm", qwen(), "needs '<extra_0>' to be 1 token of its own, which it is not here"),
        ("pqm", llama3(), r"needs '\[PRM\]' to be 1 token of its own"),
        ("math-shepherd", bytes_only(), "needs 'ки' to be 1 token of its own"),
        ("llemma", llama3(), r"needs '\\n\\n' to be 2 tokens of its own"),
        ("math-psa", mistral(), r"needs ' \\n\\n\\n\\n\\n' to be 1 token of its own"),
        ("qwen-math-prm", mistral(), "is rendered by the checkpoint's chat template, this tokenizer has none"),
    ],
)
def test_wrong_tokenizer(family, tokenizer, message):
    with pytest.raises(ValueError, match=f"PRM family '{family}' {message}.*the PRM's own checkpoint"):
        TextVerifier(tokenizer, FAMILIES[family])


def words(*vocabulary):
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def test_tokens_that_the_tokenizer_lacks():
    with pytest.raises(ValueError, match=r"ends a step with '\\n', which this tokenizer has no token for"):
        TextVerifier(words("a", "<unk>"), FAMILIES["trl"])
    family = PrmFamily(name="mine", rows=("+", "-"), mix=(1, 0))
    with pytest.raises(ValueError, match=r"scores by the logits of \('\+', '-'\), which are tokens \(0, 1\) here"):
        TextVerifier(words("+", "<unk>"), family)
    with pytest.raises(ValueError, match="must be distinct"):
        TextVerifier(bytes_only(), get_family(family, rows=("x+", "y+")))


def test_published_ids_hold_where_the_vocabulary_is_the_real_one():
    tokenizer = qwen("<|im_start|>")
    with pytest.raises(ValueError, match=r"'skywork' has '\\n' as token 199, here it is 198"):
        TextVerifier(tokenizer, get_family("skywork", vocab=tokenizer.vocab_size, ids={"\n": 199}))
    TextVerifier(tokenizer, get_family("skywork", vocab=tokenizer.vocab_size, ids={"\n": 198}))
    TextVerifier(tokenizer, get_family("skywork", vocab=tokenizer.vocab_size + 1, ids={"\n": 199}))


def test_the_step_token_of_qwen_is_the_one_that_the_checkpoints_tokenizer_has():
    """Wherever it maps it; a tokenizer that spells it in several tokens is refused (test_wrong_tokenizer)."""
    seen = set()
    for more in (("<extra_0>",), ("<a>", "<b>", "<extra_0>"), ("<extra_0>", "<a>")):
        tokenizer = qwen(None, *more)
        verifier = TextVerifier(tokenizer, FAMILIES["qwen-math-prm"])
        new = verifier.extend(verifier.start("1+2?"), STEPS)
        marker = tokenizer.convert_tokens_to_ids("<extra_0>")
        assert [new.ids[read] for read in new.reads] == [marker, marker]
        seen.add(marker)
        verifier.limit(512, marker + 1)
        with pytest.raises(ValueError, match=rf"ends a step with '<extra_0>', ids \[{marker}\]; .* embeds {marker} tokens"):
            verifier.limit(512, marker)
    assert len(seen) > 1 and 151651 not in seen


def test_a_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = tiny_tokenizers.byte_level(
        tiny_tokenizers.QWEN_SPLIT, ["<|end|>"], None,
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}",
    )  # fmt: skip
    verifier = TextVerifier(tokenizer, FAMILIES["rlhflow-mistral"])
    with pytest.raises(ValueError, match="the chat template changes an earlier turn when a later one follows"):
        verifier.extend(verifier.start("q"), ["a", "b"])


def test_whole_texts_need_character_offsets():
    class Slow:
        is_fast, bos_token_id, unk_token_id = False, None, None

    with pytest.raises(ValueError, match="needs character offsets, which Slow does not give"):
        TextVerifier(Slow(), FAMILIES["math-shepherd"])
