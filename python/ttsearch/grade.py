"""Is an answer right? By canonical key first; else math-verify, in a process that a time limit can end."""

from __future__ import annotations

import atexit
import json
import os
import selectors
import subprocess
import sys
import threading
from pathlib import Path

from .answers import answer_key, extract_answer

TIME_LIMIT_SECONDS = 5.0
_START_LIMIT_SECONDS = 60.0  # importing sympy


def gold_answer(text: str) -> str:
    """The reference answer in a data set's own form: behind `####`, boxed, or as it stands."""
    if "####" in text or "\\boxed{" in text:
        return extract_answer(text) or text.strip()
    return text.strip()


def is_correct(answer: str | None, gold: str, *, time_limit_s: float = TIME_LIMIT_SECONDS) -> bool:
    """Whether `answer` equals `gold` mathematically; None is wrong, and so is what exceeds the time limit."""
    if answer is None:
        return False
    gold = gold_answer(gold)
    key, gold_key = answer_key(answer), answer_key(gold)
    if key == gold_key:
        return True
    if _is_number(key) and _is_number(gold_key) and "%" not in answer + gold:  # 50% is 50, and 0.5
        return False
    if key.lower() == gold_key.lower():  # \Delta and \delta, which math-verify reads alike
        return False
    return _worker.verify(answer, gold, time_limit_s)


def _is_number(key: str) -> bool:
    return key.lstrip("-").replace("/", "", 1).isdigit()


class _Worker:
    """One child process for math-verify: some expressions never end or take all memory, and are killed."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def verify(self, answer: str, gold: str, limit_s: float) -> bool:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            request = json.dumps([answer, gold]) + "\n"
            try:
                self._process.stdin.write(request.encode())
                self._process.stdin.flush()
                line = self._read_line(limit_s)
            except BrokenPipeError:
                line = None
            except BaseException:  # its answer would be taken for that of the next pair
                self.stop()
                raise
            if line is None:  # too slow, or it died
                self.stop()
                return False
            return json.loads(line)

    def _start(self) -> None:
        package_root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ttsearch.grade_worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": path}, start_new_session=True,
        )  # fmt: skip
        if self._read_line(_START_LIMIT_SECONDS) is None:
            self.stop()
            raise RuntimeError(
                "grading needs math-verify and it did not start; try `python -m ttsearch.grade_worker`, "
                "or `pip install math-verify`"
            )

    def _read_line(self, limit_s: float) -> bytes | None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(limit_s):
                return None
        return self._process.stdout.readline() or None

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
            self._process = None


_worker = _Worker()
atexit.register(_worker.stop)
