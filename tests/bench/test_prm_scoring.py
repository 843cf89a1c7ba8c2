"""bench/prm_scoring.py: every method gives the same scores, and the report adds up what was measured, no more."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "bench" / "prm_scoring.py"
TINY = "--layers 2 --hidden 192 --problem 20 --length 5 --num-steps 4 --paths 3 --vocab 1000 --rounds 1".split()


def run(folder, *arguments):
    command = [sys.executable, SCRIPT, *arguments, *TINY, "--models", folder, "--out", folder / "out.json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_methods_agree_and_the_report_keeps_to_the_steps_measured(tmp_path, cpu_extension):
    run(tmp_path, "time", "--steps", "2:3")
    found = run(tmp_path, "time", "--steps", "4:4", "--methods", "ours", "cache")
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["largest_score_difference"] < 0.05
    full = sum(3 * (20 + 5 * k) for k in (2, 3))
    assert found["tokens"] == {"ours": 45, "no_reuse": full, "full": full, "keep": full, "cache": 45}
    assert found["steps"] == {m: [2, 3, 4] if m in ("ours", "cache") else [2, 3] for m in found["steps"]}
    steps = record["steps"]
    ours = sum(steps[k]["ours"]["seconds"][0] for k in "23")
    assert found["times_ours"]["full"] == sum(steps[k]["full"]["seconds"][0] for k in "23") / ours
