"""docs/verifiers.md: its snippets and examples run, its table has every family, the files it names exist."""

import asyncio
import json
import re
from pathlib import Path

import pytest
import torch
from chat_models import chat_tokenizer
from tiny_models import write_tiny
from tiny_tokenizers import bytes_only, mistral
from ttsearch.verifiers import FAMILIES, GENERATIVE, PrmFamily, TextVerifier, get_family
from ttsearch.verifiers.session import load_verifier

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "verifiers.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.S)
EXAMPLES = re.findall(r"```json\n(.*?)```", TEXT, re.S)


def test_the_table_has_every_family():
    rows = re.findall(r"^\| (`.*?) \|", TEXT, re.M)
    named = [name for row in rows for name in re.findall(r"`([\w-]+)`", row)]
    assert sorted(named) == sorted([*FAMILIES, *GENERATIVE])


def test_lines_fit():
    assert [line for line in TEXT.splitlines() if len(line) > 120] == []


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_snippet_runs(number, capsys):
    names = {}
    exec(compile(PYTHON[number], f"docs/verifiers.md snippet {number}", "exec"), names)
    if "FAMILY" in names:
        assert isinstance(names["FAMILY"], PrmFamily) and TextVerifier(mistral(), names["FAMILY"]).head.mix == (1, 0)
    else:
        assert capsys.readouterr().out.startswith("[0.")


def test_the_complete_example_scores_as_it_says(tmp_path, cpu_extension):
    tokenizer = bytes_only(bos_token="<s>")
    model = write_tiny(tmp_path, "llama", kind="ForTokenClassification", num_labels=3, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "ttsk_prm.json").write_text(EXAMPLES[0])
    steps = ["Step 1: a = 2\n", "so b = 3"]
    with load_verifier(tmp_path, dtype="fp32", kv_bytes=1 << 24) as verifier:
        assert verifier.text.family.name == "my-prm" and verifier.text.max_length == 256
        session = verifier.open("a + 1?")
        scores = asyncio.run(session.score(session.root, steps)).scores
        session.close()
    ids = tokenizer.encode("<s>Problem: a + 1?\nSolution:\nStep 1: a = 2\nStep 2: so b = 3\n")
    with torch.inference_mode():
        chances = model(torch.tensor([ids])).logits[0].softmax(-1)
    ends = [len(tokenizer.encode("<s>Problem: a + 1?\nSolution:\nStep 1: a = 2\n")) - 1, len(ids) - 1]
    assert scores == pytest.approx([float(chances[i] @ torch.tensor([0, 0.5, 1])) for i in ends], abs=1e-5)


@pytest.mark.parametrize("number", range(1, len(EXAMPLES)))
def test_the_other_examples_are_families(number, tmp_path):
    (tmp_path / "mine.json").write_text(EXAMPLES[number])
    family, given = get_family(tmp_path / "mine.json"), json.loads(EXAMPLES[number])
    base = (FAMILIES | GENERATIVE)[given.pop("family")]
    changed = {name for name in given if getattr(family, name) != getattr(base, name)}
    assert changed == set(given)
    if isinstance(family, PrmFamily):
        assert TextVerifier(chat_tokenizer(), family).head.mix == (1, 0)


def test_named_files_exist():
    for path in set(re.findall(r"`((?:docs|bench|python|csrc|ttskernels|tests)/[\w./]*)`", TEXT)):
        assert (ROOT / path).exists(), f"docs/verifiers.md names {path}, which does not exist"
