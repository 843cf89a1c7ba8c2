"""Who takes part: the worker, the precision and model form it loads, and the environment variables that it is given."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

from install import python_of
from models import HERE, ROOT, get


@dataclass(frozen=True)
class Engine:
    peer: str  # <peer>_worker.py, and its environment
    precision: str  # as the worker understands it
    form: str  # of the model, see models.py

    @property
    def bits(self) -> str:
        """Which peak its arithmetic is held against: "bf16" or "int8"."""
        return "bf16" if "bf16" in self.precision else "int8"


ENGINES = {
    "ours bf16": Engine("ours", "bf16", "hf"),
    "ours bf16 float": Engine("ours", "bf16 float", "hf"),
    "ours int8": Engine("ours", "int8", "hf"),
    "ours calibrated": Engine("ours", "calibrated", "hf"),
    "transformers generate": Engine("transformers", "bf16 generate", "hf"),
    "transformers batching": Engine("transformers", "bf16 batching", "hf"),
    "transformers shared": Engine("transformers", "bf16 shared", "hf"),
    "vllm bf16": Engine("vllm", "bf16", "hf"),
    "vllm w8a8": Engine("vllm", "w8a8", "w8a8"),
    "llama.cpp bf16": Engine("llama_cpp", "bf16", "bf16.gguf"),
    "llama.cpp q8_0": Engine("llama_cpp", "q8_0", "q8_0.gguf"),
    "openvino bf16": Engine("openvino", "bf16", "openvino-bf16"),
    "openvino int8": Engine("openvino", "int8", "openvino-int8"),
    "openvino q4_1": Engine("openvino", "q4_1", "q4_1.gguf"),
}


def variables(peer: str, threads: int) -> dict[str, str]:
    """Every worker has `threads` threads, and nothing calls home."""
    common = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if peer == "ours":
        return {**common, "TTSK_NUM_THREADS": str(threads), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"}
    if peer == "vllm":
        cores = f"0-{threads - 1}"
        return common | {
            "VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
        }  # fmt: skip
    return common


LIMIT_SECONDS = 900  # a call that takes longer has hung: its worker is killed


def die_with_parent() -> None:
    """A stopped worker would outlive a driver that was killed (Linux: prctl PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class WorkerError(RuntimeError):
    """A call that the worker could not answer."""


class Worker:
    """A worker process; stopped (SIGSTOP, its whole group) whenever it is not asked anything, so that it cannot spin."""

    def __init__(self, engine: Engine, threads: int, log: Path, python: Path | None = None):
        environment = {**os.environ, **variables(engine.peer, threads)}
        command = [str(python or python_of(engine.peer)), str(HERE / f"{engine.peer}_worker.py")]
        self.engine, self.threads, self.log = engine, threads, log
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True, env=environment,
            start_new_session=True, preexec_fn=die_with_parent,
        )  # fmt: skip

    def load(self, model: str, context: int, cells: int, sequences: int, source: Path | None = None) -> dict:
        """Load `model` for paths of `context` tokens, of which `cells` are alive at once."""
        room = cells if self.engine.peer == "llama_cpp" else context
        path = str(get(model, self.engine.form, source))
        return self.call(
            "load", model=path, precision=self.engine.precision, threads=self.threads, context=room, sequences=sequences
        )

    def call(self, name: str, **arguments) -> dict:
        """The worker's answer.

        Raises:
            WorkerError: it said "error", or died; the message names its log.
        """
        self._signal(signal.SIGCONT)
        alarm = threading.Timer(LIMIT_SECONDS, self._signal, [signal.SIGKILL])
        alarm.start()
        try:
            self._process.stdin.write(json.dumps({"call": name, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            alarm.cancel()
        if not line:
            code = self._process.wait()
            raise WorkerError(f"the worker of {self.engine.peer} ended with {code} in {name}; see {self.log}")
        self._signal(signal.SIGSTOP)
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.engine.peer} {self.engine.precision} {name}: {answer['error']}")
        return answer

    def cpu_seconds(self) -> float:
        """CPU time of the worker, and of what it started."""
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rsplit(")", 1)[1].split()  # from the state on: group is the third
                ticks += sum(map(int, fields[11:15])) if int(fields[2]) == self._process.pid else 0
        return ticks / os.sysconf("SC_CLK_TCK")

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def close(self) -> None:
        """End the process and whatever it started."""
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()
        self._process.stdout.close()
