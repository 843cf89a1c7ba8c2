"""Files of solutions, their steps, and the tree of what they share."""

import json
import random

import pytest
from ttsearch.solutions import as_steps, load_solutions, shared_runs


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_every_shape_of_record(tmp_path):
    file = write(
        tmp_path / "s.jsonl",
        {"problem": "a", "solutions": ["x\n\ny", ["x", "z"]]},
        {"question": "b", "steps": ["x", "y"], "answer": "4"},
        {"problem": "c", "completion": "x\n\ny", "id": "mine"},
        {"problem": "c", "responses": [["x"]]},
    )
    problems, solutions = load_solutions(file)
    assert [p.prompt for p in problems] == ["a", "b", "c", "c"] and problems[2].id == "mine"
    assert len({p.id for p in problems}) == 4
    assert solutions == [["x\n\ny", ["x", "z"]], [["x", "y"]], ["x\n\ny"], [["x"]]]
    assert len(load_solutions(file, limit=2)[0]) == 2


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_solutions(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"s.jsonl line 1: needs one of solutions, .*got fields \['problem'\]"):
        load_solutions(write(tmp_path / "s.jsonl", {"problem": "a"}))
    with pytest.raises(ValueError, match="holds no problem"):
        load_solutions(write(tmp_path / "e.jsonl"))
    with pytest.raises(ValueError, match="limit must be >= 1"):
        load_solutions(tmp_path / "e.jsonl", 0)


def test_steps():
    assert as_steps(" a\n\n\n\nb\nc\n\n", "s") == ["a", "b\nc"]
    assert as_steps("a|b", "s", separator="|") == ["a", "b"]
    assert as_steps(["a ", "b"], "s") == ["a ", "b"]
    assert as_steps("a\r\nb\r\n\r\n\r\nc\r\n", "s") == ["a\r\nb", "c"]
    assert as_steps(("a", "b"), "s") == ["a", "b"]
    for wrong in ({"text": "a"}, {"a"}, 3, None, b"a"):
        with pytest.raises(ValueError, match=r"s\[0\] must be a text or a list of steps, got (dict|set|int|NoneType|bytes) "):
            as_steps(wrong, "s[0]")
    with pytest.raises(ValueError, match=r"solutions\[0\]\[1\] has no step"):
        as_steps(" \n\n", "solutions[0][1]")
    with pytest.raises(ValueError, match="has no step"):
        as_steps([], "s")
    with pytest.raises(ValueError, match="step 2 must be a text with something to read, got ' '"):
        as_steps(["a", " "], "s")


@pytest.mark.parametrize("seed", range(20))
def test_runs_hold_every_prefix_once(seed):
    rng = random.Random(seed)
    solutions = [[rng.choice("ab") for _ in range(rng.randint(1, 6))] for _ in range(rng.randint(1, 12))]
    prefixes, found = {tuple(s[: i + 1]) for s in solutions for i in range(len(s))}, []

    def walk(runs, path):
        for run in runs:
            found.extend((*path, *run.steps[: i + 1]) for i in range(len(run.steps)))
            own = (*path, *run.steps)
            assert run.members == [i for i, s in enumerate(solutions) if tuple(s[: len(own)]) == own]
            walk(run.children, own)

    walk(shared_runs(solutions), ())
    assert len(found) == len(prefixes) and set(found) == prefixes
