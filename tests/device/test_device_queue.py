"""Graphs and streams with a stand-in for torch.cuda: what is captured, when, on which stream, and what is held."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from ttskernels.models import device_queue
from ttskernels.models.device_queue import DeviceQueue


class FakeCuda:
    """Remembers what was asked of it; a graph replays what was launched while it was captured."""

    def __init__(self):
        self.log, self.capturing, self.streams, self.broken = [], None, ["default"], False
        self.Stream = lambda device: FakeStream(self, device)
        self.Event = FakeEvent

    def launch(self, what):
        (self.log if self.capturing is None else self.capturing).append((self.streams[-1], what))

    def current_stream(self, device):
        return self.streams[-1] if isinstance(self.streams[-1], FakeStream) else FakeStream(self, "default")

    def graph_pool_handle(self):
        return "pool"

    def CUDAGraph(self):
        graph = SimpleNamespace(launches=[])
        graph.replay = lambda: self.log.append((self.streams[-1], ("replay", [w for _, w in graph.launches])))
        return graph

    @contextmanager
    def graph(self, graph, *, pool, stream, capture_error_mode):
        assert pool == "pool" and capture_error_mode == "thread_local" and stream is self.streams[-1]
        assert device_queue.CAPTURES.locked()  # another thread's capture would be ended by what begins this one
        self.capturing = graph.launches
        try:
            yield
        finally:
            self.capturing = None
        if self.broken:
            raise RuntimeError("operation failed due to a previous error during capture")

    @contextmanager
    def stream(self, stream):
        self.streams.append(stream)
        yield
        self.streams.pop()


class FakeStream:
    def __init__(self, cuda, device):
        self.cuda, self.device = cuda, device

    def wait_stream(self, other):
        self.cuda.log.append((self, ("waits for", other)))

    def record_event(self):
        return FakeEvent()


class FakeEvent:
    def __init__(self):
        self.done = False

    def query(self):
        return self.done

    def synchronize(self):
        self.done = True


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(device_queue.torch, "cuda", fake)
    monkeypatch.setattr(device_queue, "workspace_in_use", lambda device: ("workspace", len(fake.log)))
    return fake


def test_a_key_is_captured_once_on_idle_inputs_and_then_replayed(cuda):
    queue, result = DeviceQueue(torch.device("cuda", 0)), object()

    def run(key):
        def work():
            cuda.launch("work")
            return result

        with queue.current():
            return queue.run(key, work, lambda: cuda.launch("upload"), lambda: cuda.launch("idle"))

    def launched():
        found = [what for _, what in cuda.log if what[0] != "waits for"]
        cuda.log.clear()
        return found

    replay = ("replay", ["work"])
    assert run(("a",)) is result and launched() == ["idle", "work", "upload", replay]
    assert run(("a",)) is result and launched() == ["upload", replay]
    run(("b",)), run(("a",))
    assert launched() == ["idle", "work", "upload", replay, "upload", replay]
    run(None)
    assert launched() == ["upload", "work"]
    assert queue._graphs[("a",)][2][0] == "workspace"  # held: a larger one may take its place for others
    queue.forget_graphs()
    run(("a",))
    assert launched() == ["idle", "work", "upload", replay]


def test_streams_wait_for_the_caller_and_the_caller_only_if_it_joins(cuda):
    queue, other = DeviceQueue(torch.device("cuda", 0)), DeviceQueue(torch.device("cuda", 0))
    with queue.current():
        assert cuda.streams[-1] is queue.stream
        with queue.current():  # already there: nobody waits
            pass
    first, last = cuda.log
    assert first[0] is queue.stream and last[1] == ("waits for", queue.stream)
    cuda.log.clear()
    with other.current(join=False):
        pass
    assert [who for who, _ in cuda.log] == [other.stream]  # so that what the caller does next need not wait


def test_a_fetch_runs_on_a_stream_of_its_own(cuda, monkeypatch):
    queue, used_on = DeviceQueue(torch.device("cuda", 0)), []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory, **options: empty(*shape, **options))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: used_on.append(stream), raising=False)
    fetch = queue.fetch(torch.arange(3))
    assert cuda.log == [(queue._copies, ("waits for", queue.stream))] and used_on == [queue._copies]
    assert not fetch.ready() and fetch.wait().tolist() == [0, 1, 2] and fetch.ready()


def test_off_a_gpu_everything_runs_at_once():
    queue, log = DeviceQueue(torch.device("cpu")), []
    for _ in range(2):
        with queue.current(join=False):
            queue.run("a", lambda: log.append("work"), lambda: log.append("upload"), lambda: log.append("idle"))
    assert log == ["upload", "work"] * 2
    source = torch.zeros(2)
    fetch = queue.fetch(source)
    source.fill_(1)
    assert fetch.ready() and fetch.wait().tolist() == [0, 0]
    assert queue.put(source) is source


def test_a_failed_capture_ends_all_graphs_of_the_queue_and_nothing_else(cuda):
    queue = DeviceQueue(torch.device("cuda", 0))

    def run(key):
        with queue.current():
            queue.run((key,), lambda: cuda.launch("work"), lambda: cuda.launch("upload"), lambda: cuda.launch("idle"))

    def launched():
        found = [what for _, what in cuda.log if what[0] != "waits for"]
        cuda.log.clear()
        return found

    run("a")
    cuda.broken = True
    launched()
    with pytest.warns(UserWarning, match="a CUDA graph could not be captured .*previous error.* runs without graphs"):
        run("b")
    assert launched() == ["idle", "work", "upload", "work"] and not queue._graphs
    cuda.broken = False
    run("a"), run("b")
    assert launched() == ["upload", "work"] * 2  # the allocator still gives this stream the failed graph's memory
    with pytest.raises(ValueError, match="a bug"), queue.current():
        DeviceQueue(torch.device("cuda", 0)).run(("c",), lambda: raises(), lambda: None, lambda: None)


def raises():
    raise ValueError("a bug")


def test_the_caller_waits_for_what_an_error_left_under_way(cuda):
    queue = DeviceQueue(torch.device("cuda", 0))
    with pytest.raises(ValueError, match="a bug"), queue.current():
        raises()
    assert cuda.log[-1][1] == ("waits for", queue.stream)


def test_graphs_of_a_pool_go_with_it(cuda):
    queue = DeviceQueue(torch.device("cuda", 0))
    with queue.current():
        for key in ((1, ("pool", 7)), (2, ("pool", 8)), (3, ("pool", 7))):
            queue.run(key, lambda: None, lambda: None, lambda: None)
    queue.forget_graphs(("pool", 7))
    assert list(queue._graphs) == [(2, ("pool", 8))]
