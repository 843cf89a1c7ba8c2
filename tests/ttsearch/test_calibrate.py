"""`ttsearch calibrate`, and a search with what it made."""

import json
import re

import pytest
from ttsearch.calibrate import LONGEST, TOKENS, read_ids
from ttsearch.cli import app
from ttsearch.demo import policy_path, verifier_path
from typer.testing import CliRunner

PROBLEM = "7;a*8;b-19;c+45;d-60?"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TTSK_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "texts.jsonl"
    lines = [{"problem": PROBLEM, "solution": f"a:7*8=56\nb:56-19={37 + i}"} for i in range(40)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def run(*args, code=0):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output + repr(result.exception)
    return " ".join((result.stdout if code == 0 else result.stderr).split())


def test_a_search_with_calibrated_weights(cpu_extension, texts, tmp_path):
    search = ("solve", PROBLEM, "--n", 8, "--weights", "calibrated", "--json")
    assert "make it once: ttsearch calibrate" in run(*search, code=2)
    result = CliRunner().invoke(app, ["calibrate", str(policy_path())])
    assert "use it with --weights calibrated" in result.stdout and "layers" in result.stderr
    assert re.search(r"([\d,]+) of \1 tokens", result.stderr)
    assert "it has a score head" in run("calibrate", verifier_path(), code=2)
    run("calibrate", verifier_path(), "--texts", texts)
    assert len(list((tmp_path / "cache" / "int8").iterdir())) == 3  # the layers of both, and the policy's head
    found = json.loads(run(*search))
    assert found["answer"] == str(7 * 8 - 19 + 45 - 60)


def test_texts_are_cut_to_what_is_needed(texts):
    ids = read_ids(texts, ["problem", "solution"], policy_path(), None)
    assert len(ids) == 40 and len({tuple(i) for i in ids}) == 40
    texts.write_text(json.dumps({"problem": PROBLEM * 1000}) + "\n")
    assert len(read_ids(texts, ["problem"], policy_path(), None)[0]) == LONGEST
    texts.write_text((json.dumps({"problem": PROBLEM * 1000}) + "\n") * 50)
    assert sum(map(len, read_ids(texts, ["problem"], policy_path(), None))) == TOKENS


def test_a_file_of_other_texts_is_refused(texts, tmp_path):
    message = run("calibrate", policy_path(), "--texts", texts, "--field", "answer", code=2)
    assert "--field must name fields of" in message and "has problem, solution; got answer" in message
    assert "error:" in run("calibrate", policy_path(), "--texts", tmp_path / "none.jsonl", code=2)
    (tmp_path / "empty.jsonl").write_text("")
    assert "texts must hold token ids, got none" in run("calibrate", policy_path(), "--texts", tmp_path / "empty.jsonl", code=2)
