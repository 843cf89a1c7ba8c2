"""How one model's work gets onto a GPU: a stream of its own, captured graphs, copies that the host does not wait for."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable
from contextlib import contextmanager

import torch
from torch import Tensor

CAPTURES = threading.Lock()  # of the process: to begin a capture waits for the device, and that ends any other capture


class Fetch:
    """A tensor on its way to the host. Off a GPU it is there at once."""

    def __init__(self, host: Tensor, done: torch.cuda.Event | None = None):
        self._host, self._done = host, done

    def ready(self) -> bool:
        return self._done is None or self._done.query()

    def wait(self) -> Tensor:
        if self._done is not None:
            self._done.synchronize()
        return self._host


class DeviceQueue:
    """Runs work in order, next to other queues. On a CPU (the Triton interpreter) everything runs at once, uncaptured."""

    def __init__(self, device: torch.device):
        self.device, self.captures = device, device.type == "cuda"
        self._graphs: dict[tuple, tuple] = {}
        self._failed: object = None  # a graph whose capture failed: the allocator may still ask it
        if self.captures:
            self.stream, self._copies = torch.cuda.Stream(device), torch.cuda.Stream(device)
            self._memory = torch.cuda.graph_pool_handle()  # graphs replay one after the other, so they share scratch

    @contextmanager
    def current(self, join: bool = True):
        """Work inside goes to this queue: after what the caller's stream holds and, with `join`, before what it gets later.

        Without `join` results leave by `fetch`, and the caller's other queues go on meanwhile.
        """
        if not self.captures:
            yield
            return
        caller = torch.cuda.current_stream(self.device)
        if caller == self.stream:
            yield
            return
        self.stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:  # what raised may have left work under way
            if join:
                caller.wait_stream(self.stream)

    def run(self, key: tuple[Hashable, ...] | None, work: Callable[[], object], upload: Callable[[], None], idle: Callable):
        """`upload()`, then `work()`; returns what `work` returned.

        `work` must read what changes from memory that `upload` writes, and ask nothing of the host. Under a key it is
        captured once, after a run on the inputs that `idle` leaves, which must be harmless (it compiles kernels and
        grows workspaces), and replayed from then on: it returns the same tensors every time. None: not captured.
        """
        captured = None if key is None or not self.captures else self._graphs.get(key) or self._capture(key, work, idle)
        upload()
        if captured is None:
            return work()
        graph, result, _ = captured
        graph.replay()
        return result

    def _capture(self, key: tuple, work: Callable[[], object], idle: Callable[[], None]) -> tuple | None:
        """None: a capture has failed, now or before. The allocator then takes whatever this stream allocates for part of it,
        and would give away what other graphs write to, so all of them are dropped and none is made any more."""
        if self._failed is not None:
            return None
        idle()
        work()
        graph = torch.cuda.CUDAGraph()
        try:
            with CAPTURES, torch.cuda.graph(graph, pool=self._memory, stream=self.stream, capture_error_mode="thread_local"):
                result = work()
        except RuntimeError as error:
            self._failed = graph
            self._graphs.clear()
            warnings.warn(
                f"a CUDA graph could not be captured ({error}), so this model runs without graphs from now on, more slowly; "
                "no thread may synchronise the whole device (torch.cuda.synchronize) or capture while an engine starts",
                stacklevel=2,
            )
            return None
        self._graphs[key] = captured = graph, result, workspace_in_use(self.device)
        return captured

    def forget_graphs(self, of: Hashable = None) -> None:
        """Memory that captured work reads has moved: all of it, or what keys name with `of`."""
        for key in [key for key in self._graphs if of is None or of in key]:
            del self._graphs[key]

    def give(self, result: Tensor) -> Tensor:
        """`result` of this queue, for the caller's stream to read: its memory is not used again before that has."""
        if self.captures:
            result.record_stream(torch.cuda.current_stream(self.device))
        return result

    def put(self, host: Tensor) -> Tensor:
        """A copy of a small CPU tensor on the device."""
        return host.pin_memory().to(self.device, non_blocking=True) if self.captures else host

    def fetch(self, source: Tensor) -> Fetch:
        """Copy `source` as it is now, beside later work of this queue; it must not be written before the copy is done."""
        if not self.captures:
            return Fetch(source.clone())
        self._copies.wait_stream(self.stream)
        source.record_stream(self._copies)
        with torch.cuda.stream(self._copies):
            host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            host.copy_(source, non_blocking=True)
            return Fetch(host, self._copies.record_event())


def pool_name(pool) -> tuple[str, int]:
    """What names a pool, or a half of it, in the keys of captured work: its memory."""
    return "pool", pool.k.untyped_storage().data_ptr()


def workspace_in_use(device: torch.device):
    """Scratch that kernels captured just now keep the address of; whoever replays them must hold it."""
    from ttskernels._triton.workspace import workspace

    return workspace(device, 0)
