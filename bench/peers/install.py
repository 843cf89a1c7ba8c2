"""A virtual environment for each peer, from the pinned lists in requirements/ (complete, so nothing is resolved).

    python bench/peers/install.py [transformers vllm llama_cpp openvino openvino_export]

llama-cpp-python is compiled for this machine (minutes). `openvino_export` only converts models. PIP_ARGS is passed to pip.
torch comes from wherever pip is set up to find it: point it at a CPU build, as README.md says under "Install".
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import venv
from pathlib import Path

from models import HERE, cache

PEERS = ("transformers", "vllm", "llama_cpp", "openvino", "openvino_export")
CMAKE_ARGS = "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"


def python_of(peer: str) -> Path:
    """The peer's interpreter; our own for `ours`."""
    return Path(sys.executable) if peer == "ours" else cache() / "env" / peer / "bin" / "python"


def install(peer: str) -> None:
    """Set up what is not there; a finished environment with the same list is left alone."""
    wanted = (HERE / "requirements" / f"{peer}.txt").read_text()
    folder = cache() / "env" / peer
    done = folder / "installed.txt"
    if done.exists() and done.read_text() == wanted:
        return
    print(f"installing {peer}", flush=True)
    if not python_of(peer).exists():
        venv.create(folder, with_pip=True)
    environment = {"CMAKE_ARGS": CMAKE_ARGS, **os.environ}
    pip = [python_of(peer), "-m", "pip", "install", "-q", *shlex.split(os.environ.get("PIP_ARGS", ""))]
    subprocess.run([*pip, "--no-deps", "-r", HERE / "requirements" / f"{peer}.txt"], check=True, env=environment)
    done.write_text(wanted)


if __name__ == "__main__":
    for name in sys.argv[1:] or PEERS:
        if name not in PEERS:
            raise SystemExit(f"peer must be one of {', '.join(PEERS)}, got {name!r}")
        install(name)
