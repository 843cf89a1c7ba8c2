"""The accuracy table and the trees of the attention table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
DEMO = BENCH.parent / "python" / "ttsearch" / "demo" / "models" / "policy-base"
sys.path.insert(0, str(BENCH))

from attention_table import roofline_seconds  # noqa: E402
from bench_tree_attention import Case, tree_nodes  # noqa: E402
from int8_accuracy import compare, summary  # noqa: E402

from ttskernels.ops.tree_attention import tree_attention  # noqa: E402


def test_compare():
    exact = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    other = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    kl, equal = compare(exact, other)
    p = torch.tensor([0.0, 1.0]).double().softmax(0)
    expected = (p * (p / p.flip(0)).log()).sum()
    torch.testing.assert_close(kl, torch.stack([expected, torch.zeros_like(expected)]))
    assert equal.tolist() == [False, True]


def test_summary():
    chunks = [
        {"tokens": 100, "kl_sum": 0.5, "kl_max": 0.1, "equal": 99},
        {"tokens": 300, "kl_sum": 0.7, "kl_max": 0.2, "equal": 297},
    ]
    found = summary({"chunks": chunks})
    assert found == {"tokens": 400, "mean_kl_nats": 0.003, "max_kl_nats": 0.2, "equal_argmax": 0.99, "counts": True}
    assert not summary({"chunks": [{**chunks[0], "kl_sum": 2.0}]})["counts"]
    assert not summary({"chunks": [{**chunks[0], "equal": 90}]})["counts"]


def accuracy(tmp_path, *more):
    texts = tmp_path / "texts.jsonl"
    lines = [{"question": f"{i} + {i} =", "answer": str(2 * i)} for i in range(12)]
    texts.write_text("\n".join(map(json.dumps, lines)))
    command = [sys.executable, str(BENCH / "int8_accuracy.py"), "--model", str(DEMO), "--texts", str(texts)]
    return subprocess.run([*command, "--weights", "float", *more], capture_output=True, text=True)


def test_accuracy_of_a_model_against_itself(tmp_path):
    """And a file that was cut short is completed."""
    out = tmp_path / "out.json"
    first = accuracy(tmp_path, "--out", str(out))
    assert first.returncode == 0, first.stderr[-2000:]
    record = json.loads(out.read_text())
    assert len(record["chunks"]) == 12 and record["summary"]["tokens"] > 60
    assert record["summary"]["mean_kl_nats"] == 0.0 and record["summary"]["equal_argmax"] == 1.0
    out.write_text(json.dumps(record | {"chunks": record["chunks"][:5]}))
    assert accuracy(tmp_path, "--out", str(out)).returncode == 0
    assert json.loads(out.read_text())["summary"] == record["summary"]
    other = accuracy(tmp_path, "--out", str(out), "--tokens", "10")
    assert other.returncode != 0 and "choose another --out" in other.stderr
    assert "--fields must name fields" in accuracy(tmp_path, "--fields", "problem").stderr


@pytest.mark.parametrize("kind", ["best-of-N", "unshared", "beam", "dvts"])
def test_tree_nodes(kind):
    nodes, leaves = tree_nodes(kind, 16, 100, 440)
    above = {node: tokens for node, (_, tokens) in enumerate(nodes)}

    def path(node):
        return [] if node < 0 else [*path(nodes[node][0]), node]

    assert len(leaves) == 16 == len(set(leaves))
    assert {sum(above[node] for node in path(leaf)) for leaf in leaves} == {540}
    assert {node for leaf in leaves for node in path(leaf)} == set(above)  # what is above no leaf is gone
    assert all(parent < node for node, (parent, _) in enumerate(nodes))
    unique = sum(above.values())
    if kind == "unshared":
        assert unique == 16 * 540
    if kind == "dvts":  # four subtrees: five whole steps each, and the sixth half done, four times
        assert unique == 100 + 4 * (5 * 80 + 4 * 40)
    if kind == "beam":
        assert 100 + 5 * 80 + 16 * 40 <= unique <= 100 + 4 * 5 * 80 + 16 * 40


@pytest.mark.parametrize("kind", ["beam", "dvts", "unshared"])
def test_flat_and_shared_agree(kind):
    sizes = (8, 4, 2, 64, 48, 200)
    shared, flat = (Case(*sizes, torch.bfloat16, shared=shared, tree=kind) for shared in (True, False))
    a, b = (tree_attention(case.q, case.k, case.v, case.plan, impl="cpu") for case in (shared, flat))
    torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-2)


def test_roofline_counts_each_node_once():
    case = Case(4, 4, 2, 64, 48, 16, torch.bfloat16)
    moved = 4 * 2 * 64 * (48 + 4 * 16)
    assert roofline_seconds(case, float("inf"), 1.0) == pytest.approx(moved / 1e9)
    flops = 4 * 4 * 64 * 4 * (48 + 16)
    assert roofline_seconds(case, 1.0, float("inf")) == pytest.approx(flops / 1e9)
