"""How other threads ask the engine's: functions to be run there, and what becomes of them when it stops."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future


def tell(waiting: Future, error: BaseException) -> None:
    """End a future that nobody works on, unless whoever asked has given up."""
    if waiting.set_running_or_notify_cancel():
        waiting.set_exception(error)


class Commands:
    """A queue of functions. `stopped` is why there will be no more work; None as long as there may be."""

    def __init__(self) -> None:
        self.stopped: BaseException | None = None
        self._queue: queue.SimpleQueue = queue.SimpleQueue()

    def call(self, function: Callable, refused: Callable[[BaseException], object] | None = None) -> Future:
        """A future of what the function returns there; `refused` hears of its error, or why it will never run.

        Raises:
            RuntimeError: the engine has stopped.
        """
        if self.stopped is not None:
            raise RuntimeError(f"the engine takes no more work: {self.stopped}") from self.stopped
        result: Future = Future()
        if refused is not None:
            result.add_done_callback(lambda done: done.exception() is not None and refused(done.exception()))
        self._queue.put((function, result))
        if self.stopped is not None:  # since then: perhaps nobody looks any more
            self.stop(self.stopped)
        return result

    def tidy(self, function: Callable, wait: bool = False) -> None:
        """The same for what gives something back: an engine that has stopped holds nothing any more."""
        if self.stopped is None:
            done = self.call(function)
            if wait:
                done.result()

    def end(self) -> None:
        """The engine's thread is to stop once it has run what was asked before."""
        self._queue.put(None)

    def take(self, block: bool, timeout: float | None = None) -> list[tuple[Callable, Future] | None]:
        """On the engine's thread: what waits, up to the end (None), if that was asked for."""
        commands = []
        try:
            commands.append(self._queue.get(block, timeout))
            while commands[-1] is not None:
                commands.append(self._queue.get_nowait())
        except queue.Empty:
            pass
        return commands

    def stop(self, error: BaseException) -> None:
        """Refuse what waits and whatever may come."""
        self.stopped = error
        while commands := self.take(block=False):
            for command in commands:
                if command is not None:
                    tell(command[1], error)
