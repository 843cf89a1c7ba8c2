"""bench/step_search.py on the shipped models: every method decodes, scores are timed, and the summary adds up the rounds."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "bench" / "step_search.py"
METHODS = ("best_of_n", "beam_search", "dvts")


def test_two_rounds_in_two_runs(tmp_path, cpu_extension):
    out = tmp_path / "out.json"
    for first in "01":
        command = [sys.executable, SCRIPT, "--demo", *"--n 4 --width 2 --rounds 1 --kv-gib 1 --first".split(), first]
        command += ["--methods", *METHODS, "--out", out]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(out.read_text())
    assert record["summary"] == json.loads(done.stdout.splitlines()[-1])["summary"]
    for method in METHODS:
        runs, row = record["runs"][method], record["summary"][method]
        assert len(runs) == row["rounds"] == 2
        assert all(run["decoded"] > 0 and run["scored"] > 0 and run["iterations"] > 0 for run in runs)
        assert all(run["rows"] >= run["decoded"] - run["paths"] for run in runs)
        assert {"decode", "score", "planning", "python", "idle"} <= runs[0]["parts"].keys()
        assert all(sum(run["parts"].values()) <= 1.05 * run["seconds"] for run in runs)
