"""Every kind of verifier in a search, in `score_steps` and on the command line; the demo policy writes the steps."""

import json

import pytest
from chat_models import write_chat_model
from ttsearch.backend import load_backend, load_verifier
from ttsearch.cli import app
from ttsearch.demo import policy_path
from ttsearch.scoring import score_steps
from ttsearch.solve import solve
from ttsearch.tree import walk
from ttsearch.verifiers import GENERATIVE, ThinkPrm, detect_family, get_family
from typer.testing import CliRunner

OFTEN = ["</think>", "Is the solution", " correct?", "}x", "}", "Yes", "No", "</analyze>\n", "</output>\n"]
PROBLEM = "7;a*8;b-19;c+45?"
SOLUTIONS = [["7*8=56", "56-19=37", "37+45=82"], ["7*8=56", "56-19=47"]]
RULES = dict(n=4, width=2, temperature=1.0, max_tokens=48)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = [tmp_path_factory.mktemp(name) for name in ("chat", "reference")]
    for seed, folder in enumerate(made):
        write_chat_model(folder, seed + 5, **dict.fromkeys(OFTEN, 2.5))
    return made


@pytest.fixture(scope="module")
def kinds(folders, tmp_path_factory):
    """What `load_backend` needs for each kind; generative ones with short drafts, from a file."""
    files = tmp_path_factory.mktemp("families")
    for name in GENERATIVE:
        (files / f"{name}.json").write_text(json.dumps({"family": name, "max_tokens": 40, "samples": 2}))
    return {
        "judge": {"prm_family": "judge"},
        "implicit": {"prm_family": "implicit", "prm_reference": folders[1]},
        "thinkprm": {"prm_family": files / "thinkprm.json"},
        "genprm": {"prm_family": files / "genprm.json"},
    }


@pytest.mark.parametrize("kind", ["judge", "implicit", "thinkprm", "genprm"])
def test_a_search_is_guided_by_any_verifier(folders, kinds, kind):
    aggregate = "last" if kind == "implicit" else "product"
    with load_backend(policy_path(), folders[0], dtype="fp32", kv_gib=0.02, **kinds[kind]) as backend:
        first, again = (
            solve(PROBLEM, backend=backend, strategy="beam_search", aggregate=aggregate, **RULES) for _ in range(2)
        )
        engines = [backend.engine, backend.verifier.engine]
        assert (engines[0] is engines[1]) == (kind in ("judge", "implicit"))
        for engine in engines:
            engine.forget_prompts()
        assert not any(engine.budget.used_bytes for engine in engines)

    def tree(result):
        return {node.path_key: (node.text, node.step_score) for node in walk(result.root) if node.parent is not None}

    assert tree(first) == tree(again) and len(first.candidates) == 4
    scores = [score for _, score in tree(first).values()]
    assert any(isinstance(score, float) for score in scores)
    assert kind in ("thinkprm", "genprm") or None not in scores
    cost = first.cost.verifier
    assert cost.flops > 0 and cost.tokens_prefilled > 0 and (cost.tokens_decoded > 0) == (kind in ("thinkprm", "genprm"))


def test_a_path_whose_verifications_all_failed_ranks_last(folders):
    """It has no score: that is not a score of zero, and no error."""
    family = ThinkPrm(max_tokens=1, ends=("never this",), step_end="")
    with load_backend(policy_path(), folders[0], dtype="fp32", kv_gib=0.02, prm_family=family) as backend:
        result = solve(PROBLEM, backend=backend, strategy="beam_search", **RULES)
    assert len(result.candidates) == 4 and not any(node.step_score for node in walk(result.root))
    assert sum(backend.verifier.failures.values()) > 0


@pytest.mark.parametrize("kind", ["judge", "implicit", "thinkprm"])
def test_solutions_from_elsewhere(folders, kinds, kind, tmp_path):
    options = {"family": kinds[kind]["prm_family"], "dtype": "fp32", "kv_bytes": 1 << 24}
    if kind == "implicit":
        options["reference"] = folders[1]
    if kind == "thinkprm":
        options |= {"samples": 1, "max_tokens": 60, "temperature": 0.0}
    scored = score_steps([PROBLEM], [SOLUTIONS], folders[0], results=tmp_path / "out.jsonl", **options)[0]
    assert [len(solution.scores) for solution in scored] == [3, 2]
    assert scored[0].scores[0] == scored[1].scores[0]
    for solution in scored:
        assert (solution.error is None) == (None not in solution.scores) == (solution.mean is not None)
    assert scored[0].tokens_computed > 0
    again = score_steps([PROBLEM], [SOLUTIONS], folders[0], results=tmp_path / "out.jsonl", **options)[0]
    assert again == scored, "read back"


def test_a_verification_that_failed_is_said_so(folders):
    scored = score_steps(
        [PROBLEM], [SOLUTIONS], folders[0], family="thinkprm", max_tokens=1, samples=2, dtype="fp32", kv_bytes=1 << 24
    )[0]
    assert all(s.error.startswith("no verification of a step was judged: ") and "unfinished" in s.error for s in scored)
    assert all(score is None for s in scored for score in s.scores) and scored[0].mean is None


def test_the_command_line_reaches_them(folders, kinds, tmp_path):
    runner = CliRunner()
    model = ["--verifier", str(folders[0])]
    solve_it = ["solve", PROBLEM, *model, "--policy", str(policy_path()), "--n", "4", "--max-tokens", "48", "--json"]
    solve_it += ["--kv-gib", "0.02"]
    result = runner.invoke(app, [*solve_it, "--prm-family", "judge"])
    assert result.exit_code == 0, result.output
    assert all(0 <= score <= 1 for path in json.loads(result.stdout)["candidates"] for score in path["step_scores"])
    silent = tmp_path / "silent.json"
    silent.write_text(json.dumps({"family": "thinkprm", "max_tokens": 1, "samples": 2}))
    result = runner.invoke(app, [*solve_it, "--prm-family", str(silent)])
    assert result.exit_code == 0, result.output
    assert "verifications without a score: " in result.stderr and " unfinished" in result.stderr
    result = runner.invoke(app, [*solve_it, "--prm-family", "implicit"])
    assert result.exit_code == 2 and "pass as reference the model that" in " ".join(result.output.split())
    (tmp_path / "in.jsonl").write_text(json.dumps({"problem": PROBLEM, "solutions": ["\n\n".join(s) for s in SOLUTIONS]}))
    pair = ["--prm-family", "implicit", "--prm-reference", str(folders[1]), "--results", str(tmp_path / "out.jsonl"), "--json"]
    pair += ["--kv-gib", "0.02"]
    result = runner.invoke(app, ["score", str(tmp_path / "in.jsonl"), *model, *pair])
    assert result.exit_code == 0 and json.loads(result.stdout)["steps"] == 5, result.output


def test_generative_families_are_data_too(folders, tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps({"family": "genprm", "samples": 3, "verify": ""}))
    family = get_family(tmp_path / "mine.json")
    assert (family.samples, family.verify, family.name) == (3, "", "genprm")
    with pytest.raises(ValueError, match=r"fields of a PRM family are name, source, .*, got \['suffix'\]"):
        get_family("thinkprm", suffix="x")
    named = tmp_path / "ThinkPRM-1.5B"
    named.symlink_to(folders[0])
    assert detect_family(named) == ThinkPrm()
    with pytest.raises(ValueError, match="reference must be None for generative family 'thinkprm'"):
        load_verifier(folders[0], "thinkprm", reference=folders[1])
