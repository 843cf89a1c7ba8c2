"""Run a coroutine from synchronous code, in a notebook's running loop too; Ctrl-C cancels it cleanly."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Coroutine
from contextlib import contextmanager, suppress
from typing import Any

# A signal that comes just before a blocking call, or to another thread, is seen by Python only when that call ends.
_LOOK_SECONDS = 0.2


def run_sync(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The coroutine's result. Ctrl-C cancels it; a result it answers the cancellation with is returned."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_awake(coroutine))  # turns SIGINT into a cancellation of the coroutine
    return _run_in_thread(coroutine)


async def _awake(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The coroutine, in a loop that never sleeps for long: nothing else may wake it for a Ctrl-C."""

    async def look():
        while True:
            await asyncio.sleep(_LOOK_SECONDS)

    looking = asyncio.ensure_future(look())
    try:
        return await coroutine
    finally:
        looking.cancel()


def _run_in_thread(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """A loop of its own in another thread, as the caller's thread already runs one."""
    outcome: dict[str, Any] = {}
    started, ended = threading.Event(), threading.Event()

    async def main():
        outcome["loop"], outcome["task"] = asyncio.get_running_loop(), asyncio.current_task()
        started.set()
        return await coroutine

    def target():
        try:
            outcome["result"] = asyncio.run(main())
        except BaseException as error:  # noqa: BLE001  handed to the caller's thread
            outcome["error"] = error
        finally:
            started.set()
            ended.set()

    thread = threading.Thread(target=target, name="ttsearch", daemon=True)
    with _plain_sigint():  # before the thread starts: a Ctrl-C in between would go to the caller's loop, which we block
        try:
            thread.start()
            _wait(ended)  # not thread.join(): interrupted, it may take the thread for dead
        except KeyboardInterrupt:
            if not started.wait(5):  # nothing has begun
                raise
            if "loop" in outcome:
                with suppress(RuntimeError):  # the loop has just ended by itself
                    outcome["loop"].call_soon_threadsafe(outcome["task"].cancel)
            _wait(ended)
    if "error" in outcome:
        if isinstance(outcome["error"], asyncio.CancelledError):
            raise KeyboardInterrupt
        raise outcome["error"]
    return outcome["result"]


def _wait(event: threading.Event) -> None:
    while not event.wait(_LOOK_SECONDS):
        pass


@contextmanager
def _plain_sigint():
    """Let Ctrl-C raise KeyboardInterrupt: asyncio.run would only cancel the caller's task, which we block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
