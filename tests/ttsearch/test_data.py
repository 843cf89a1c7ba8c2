"""Problem files in the shapes of the common data sets."""

import json
import os
from pathlib import Path

import pytest
from ttsearch.data import load_problems, parse_record
from ttsearch.grade import is_correct
from ttsearch.types import Problem


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_shapes(tmp_path):
    path = write(
        tmp_path / "p.jsonl",
        {"question": "How many?", "answer": "9 * 2 = 18\n#### 18"},
        {"problem": "Convert", "answer": "(3,\\pi)", "level": "Level 2", "unique_id": "test/1.json"},
        {"problem": "AIME", "solution": "text", "extracted_groundtruth": "204", "url": "u1"},
        {"problem": "AMC", "solution": 27.0, "extracted_groundtruth": 27.0, "url": "u2"},
        {"problem": "MATH", "solution": "so \\boxed{5}."},
        {"prompt": "open"},
    )
    problems = load_problems(path)
    assert [p.answer for p in problems] == ["18", "(3,\\pi)", "204", "27", "5", None]
    assert problems[1].id == "test/1.json" and problems[1].level == "Level 2"
    assert problems[0].id == Problem("How many?").id
    assert len(load_problems(path, limit=2)) == 2


def test_repeated_ids_are_told_apart(tmp_path):
    path = write(tmp_path / "p.jsonl", *({"problem": text, "url": "same"} for text in ("a", "b", "b")))
    ids = [p.id for p in load_problems(path)]
    assert len(set(ids)) == 3 and ids[0] == "same"


def test_invalid(tmp_path):
    with pytest.raises(
        ValueError, match=r"p.jsonl line 1: needs a text field problem or question or prompt, got .*'x'"
    ):
        load_problems(write(tmp_path / "p.jsonl", {"x": 1}))
    (tmp_path / "q.jsonl").write_text('{"problem": "a"}\n{oops\n')
    with pytest.raises(ValueError, match="q.jsonl line 2: not JSON"):
        load_problems(tmp_path / "q.jsonl")
    with pytest.raises(ValueError, match="must be a JSON object, got int"):
        load_problems(write(tmp_path / "r.jsonl", 5))
    with pytest.raises(ValueError, match="holds no problem"):
        load_problems(write(tmp_path / "e.jsonl"))
    with pytest.raises(ValueError, match="'absent.jsonl' does not exist"):
        load_problems("absent.jsonl")
    with pytest.raises(ValueError, match="limit must be >= 1, got 0"):
        load_problems(tmp_path / "p.jsonl", limit=0)
    with pytest.raises(ValueError, match="prompt must be a non-empty str"):
        Problem("")


def test_hub_needs_datasets(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        load_problems("owner/name")


def test_a_solution_is_an_answer_only_if_it_marks_one():
    def gold(**record):
        return parse_record({"problem": "p", **record}).answer

    assert gold(solution="We get x. So it is 5.") is None
    assert gold(solution="so \\boxed{}, 5") is None
    assert gold(solution="so 5 + 1\n#### 6") == "6" and gold(solution=27.0) == "27"
    assert gold(answer="", solution="so \\boxed{3}") == "3"
    assert gold(answer="", extracted_groundtruth="4", solution="so \\boxed{3}") == "4"
    with pytest.raises(ValueError, match=r"record: answer must be a text or a number, got \['3', '4'\]; write several"):
        gold(answer=["3", "4"])


def test_what_is_no_utf8_is_said_so_with_its_place(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"problem": "\xff"}\n')
    with pytest.raises(ValueError, match="latin.jsonl.* must be UTF-8, it is not"):
        load_problems(tmp_path / "latin.jsonl")
    (tmp_path / "lone.jsonl").write_text('{"problem": "a"}\n{"problem": "\\ud800"}\n')
    with pytest.raises(ValueError, match=r"lone.jsonl line 2: prompt must be text that is UTF-8, got '\\ud800'"):
        load_problems(tmp_path / "lone.jsonl")
    with pytest.raises(ValueError, match=r"id must be text that is UTF-8, got '\\ud800'"):
        Problem("a", id="\ud800")


def test_problem_fields_are_text():
    with pytest.raises(ValueError, match=r"answer must be a str, got 11; pass str\(...\)"):
        Problem("5;a+6?", answer=11)
    with pytest.raises(ValueError, match="id must be a str, got 5"):
        Problem("5;a+6?", id=5)


def test_parse_record_keeps_zero():
    assert parse_record({"problem": "a", "answer": 0}).answer == "0"


@pytest.mark.parametrize(("name", "count"), [("gsm8k", 1), ("math500", 500), ("aime24", 30), ("amc23", 40)])
def test_real_files(name, count):
    folder = os.environ.get("TTSK_DATA_DIR")
    if not folder or not (Path(folder) / f"{name}.jsonl").exists():
        pytest.skip(f"set TTSK_DATA_DIR to a folder that holds {name}.jsonl")
    problems = load_problems(Path(folder) / f"{name}.jsonl")
    assert len(problems) >= count and len({p.id for p in problems}) == len(problems)
    assert all(p.answer and is_correct(p.answer, p.answer) for p in problems)
