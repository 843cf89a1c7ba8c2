import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from tiny_models import write_tiny
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from trees import Tree

from ttskernels import roofline
from ttskernels.kv import build_plan
from ttskernels.kv.machines import gpu_machine
from ttskernels.models import device_decoder, device_layers, load_checkpoint, load_model

# us a layer on an H100 at 3.0 TB/s and 600 TFLOP/s, by hand: flat, shared, compute
BY_HAND = {
    ("qwen2.5-1.5b", 64, 2048, 128, 2): (47.5, 3.5, 1.4),
    ("qwen2.5-7b", 256, 8192, 256, 2): (1476, 50.3, 51.7),
    ("llama-3.1-8b", 64, 1024, 512, 2): (134, 46.1, 2.7),
    ("llama-3.1-8b", 256, 8192, 256, 1): (1476, 50.3, 59),
    ("llama-2-7b", 256, 8192, 256, 2): (11811, 403, 59),
}


@pytest.mark.parametrize("case", BY_HAND, ids=lambda c: "-".join(map(str, c)))
def test_floors_against_hand_calculation(case):
    name, n, prompt, suffix, kv = case
    e = roofline.expect(roofline.SHAPES[name], [(1, prompt), (n, suffix)], kv)
    flat, shared, compute = BY_HAND[case]
    assert (e.flat_us, e.shared_us, e.compute_us) == pytest.approx((flat, shared, compute), rel=0.02)
    assert e.floor_us == max(e.shared_us, e.compute_us) and e.gain == pytest.approx(e.flat_us / e.floor_us)
    assert e.shared_us * 0.999 <= e.plan_read_us < e.flat_us
    assert e.iteration_us < e.launched_iteration_us < e.flat_iteration_us
    assert (e.flat_bytes, e.shared_bytes) == pytest.approx((e.flat_us * 3e6, e.shared_us * 3e6))


def test_an_iteration_by_hand():
    """Llama-3.2-3B's shape on 3.0 TB/s and 600 TFLOP/s: weights by bytes at 64 branches, by arithmetic at 256."""
    shape, matrices = roofline.SHAPES["llama-3.2-3b"], 28 * (3072 * 128 * 64 + 3 * 3072 * 8192) + 3072 * 128256
    for n, weights_us in ((64, 2 * matrices / 3e6), (256, 2 * matrices * 256 / 600e6)):
        e = roofline.expect(shape, [(1, 1024), (n, 256)])
        logits_us = 8 * 128256 * n / 3e6
        assert (e.weights_us, e.logits_us) == pytest.approx((weights_us, logits_us))
        assert e.iteration_us == pytest.approx(weights_us + logits_us + 28 * e.floor_us)
        assert e.launched_iteration_us == e.iteration_us + e.launch_us


def test_levels_of_a_search_tree():
    shape = roofline.SHAPES["llama-3.1-8b"]
    deep = roofline.expect(shape, [(1, 256), (4, 80), (16, 80), (64, 40)])
    two = roofline.expect(shape, [(1, 256), (64, 200)])
    assert deep.flat_us == pytest.approx(two.flat_us) and deep.shared_us < two.shared_us / 2
    with pytest.raises(ValueError, match="level 1 must have at least the 4 nodes of the level above and a token each, got 3"):
        roofline.expect(shape, [(4, 10), (3, 10)])


def test_any_tree():
    shape = roofline.SHAPES["llama-3.1-8b"]
    even, levels = roofline.Tree([-1, 0, 0, 0, 1, 1, 2, 3], [100, 20, 20, 20, 10, 10, 10, 10]), [(1, 100), (3, 20), (4, 10)]
    assert roofline.tree_of_levels(levels) == even and roofline.expect(shape, even) == roofline.expect(shape, levels)
    uneven = roofline.expect(shape, roofline.parse_nodes("100,0:30,0:7,1:12,1:15"))
    token_bytes = 2 * 8 * 128 * 2
    assert uneven.shared_bytes == token_bytes * 164 and uneven.flat_bytes == token_bytes * (142 + 145 + 107)
    with pytest.raises(ValueError, match="node 1 must have a node in front of it as parent, or none, and a token, got 1 and 5"):
        roofline.expect(shape, roofline.parse_nodes("100,1:5"))
    with pytest.raises(ValueError, match="--nodes must look like 1024,0:80,0:64"):
        roofline.parse_nodes("100,x:5")


class Products(TorchDispatchMode):
    """Counts the vendor's launches: products (a residual is added inside), gathers, and anything that adds."""

    names = {"mm": "linear", "addmm": "linear", "addmm_": "linear", "index_select": "embedding", "add": "add", "add_": "add"}

    def __init__(self, called):
        super().__init__()
        self.called = called

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = self.names.get(function._overloadpacket.__name__)
        if name and args[0].dtype == torch.float32:
            self.called[name] += 1
        return function(*args, **(kwargs or {}))


def test_launches_are_those_of_the_decoder(tmp_path, monkeypatch):
    """One decode iteration of four rows; our own ops are stood in for by the reference, unwatched."""
    write_tiny(tmp_path, "llama")
    tree, called = Tree(load_model(tmp_path, torch.float32, "reference")), Counter()
    root = tree.forest.add(None, [1, 2])
    tree.run([root])
    leaves = tree.forest.fork(root, 4)
    for leaf in leaves:
        tree.grow(leaf, [3])
    mode = Products(called)

    def stand_in(module, name):
        run = getattr(module, name)

        def counted(*args, impl, **options):
            called[name] += 1
            with _disable_current_modes():
                return run(*args, impl="reference", **options)

        monkeypatch.setattr(module, name, counted)

    for name in ("rms_norm", "rope_append", "tree_attention", "silu_mul"):
        stand_in(device_layers, name)
    for name in ("rms_norm", "sample"):
        stand_in(device_decoder, name)
    advance = SimpleNamespace(decode_advance=lambda *args: called.update(decode_advance=1))
    monkeypatch.setitem(sys.modules, "ttskernels._triton.decode_advance", advance)
    checkpoint = load_checkpoint(tmp_path, torch.float32)
    decoder = device_decoder.DeviceDecoder(checkpoint.config, checkpoint.weights, True, torch.device("cpu"))
    decoder._report.zero_()
    tokens, rows = torch.zeros(1, 4, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    heads = tree.model.heads
    plan = build_plan(tree.forest, [(leaf, 0, 1) for leaf in leaves], heads, machine=gpu_machine(heads))
    with mode:
        decoder.decode(
            rows + 3, plan, tree.pool, rows.long(), torch.tensor([[0.0, 0, 1, 0]] * 4),
            torch.zeros(1, 131, dtype=torch.int32), rows, tokens, tokens.float(),
        )  # fmt: skip
    expected = Counter(roofline.ITERATION_CALLS)
    for name, count in roofline.LAYER_CALLS.items():
        expected[name] += checkpoint.config.layers * count
    assert called == expected


def test_command_line():
    def run(*args):
        command = [sys.executable, "-m", "ttskernels", "model", *args]
        return subprocess.run(command, capture_output=True, text=True)

    done = run("--shape", "qwen2.5-1.5b", "--levels", "1x2048,64x128", "--layers", "3")
    assert done.returncode == 0 and "floor                   3.5 us, 13.6 times below flat" in done.stdout, done.stdout
    assert "39, 41 us inside a graph" in done.stdout and "a shape of your own on H100" in done.stdout
    assert "each node read once     3.5 us, 10.5 MB" in done.stdout
    assert "5 nodes of 164 tokens" in run("--nodes", "100,0:30,0:7,1:12,1:15").stdout
    slower = run("--shape", "qwen2.5-1.5b", "--branches", "64", "--prompt", "2048", "--suffix", "128", "--gb-per-second", "1500")
    assert "each node read once     7.0 us, 10.5 MB" in slower.stdout
    assert "--gb-per-second must be positive, got 0.0" in run("--gb-per-second", "0").stderr
    assert "layers of a shape must be positive, got 0" in run("--layers", "0").stderr
    assert len(run("--table").stdout.splitlines()) == 1 + len(roofline.TABLE)
    assert "--levels must look like 1x2048,64x128" in run("--levels", "64").stderr
