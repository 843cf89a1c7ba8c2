"""The README's Python snippets run, and the files it names exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet_runs(number, capsys):
    exec(compile(SNIPPETS[number], f"README.md snippet {number}", "exec"), {})


def test_there_are_snippets_and_the_first_is_eight_lines_of_code():
    assert len(SNIPPETS) >= 2
    assert sum(bool(line.strip()) for line in SNIPPETS[0].splitlines()) <= 8


def test_named_paths_exist():
    paths = set(re.findall(r"`((?:docs|bench|python|csrc|ttskernels|tests)/[\w./]*)`", TEXT)) | set(
        re.findall(r"\]\(((?:docs|bench)/[\w./-]+)\)", TEXT)
    )
    assert len(paths) > 5
    for path in paths:
        assert (ROOT / path).exists(), f"README names {path}, which does not exist"
