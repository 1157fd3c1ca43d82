"""How CUDA graphs are recorded: in which stream, with which memory, and what a failure leaves; torch's part is a fake."""

import contextlib
import inspect

import pytest
import torch

from evl_cache.train.recorder import CudaRecorder


class FakeCuda:
    """What `CudaRecorder` asks of torch.cuda; `events` is what it asked, in order."""

    def __init__(self, monkeypatch):
        self.events, fake = [], self

        class Stream:
            def __init__(self, device=None):
                self.name = "side" if device is not None else "current"

            def wait_stream(self, other):
                fake.events.append(f"{self.name} waits for {other.name}")

        class Graph:
            def pool(self):
                return f"memory of {fake.graphs.index(self)}"

            def replay(self):
                fake.events.append(f"replay {fake.graphs.index(self)}")

        current = Stream()

        @contextlib.contextmanager
        def stream(chosen):
            fake.events.append(f"in {chosen.name}")
            yield
            fake.events.append(f"out of {chosen.name}")

        @contextlib.contextmanager
        def graph(graph, pool=None, stream=None, capture_error_mode="global"):
            fake.graphs.append(graph)
            fake.events.append(f"record in {stream.name} with {pool}, errors {capture_error_mode}")
            try:
                yield
            finally:
                fake.events.append("recorded")

        class Generator:
            def __init__(self, device=None):
                self.device = device

            def graphsafe_get_state(self):
                return "fresh"

            def graphsafe_set_state(self, state):
                fake.events.append(f"generator {state}")

        self.graphs = []
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current)
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch.cuda, "graph", graph)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "default_generators", (Generator(),))
        monkeypatch.setattr(torch, "Generator", Generator)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: fake.events.append("empty"))

    def taken(self):
        events, self.events[:] = list(self.events), []
        return events


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch)


@pytest.fixture
def recorder(cuda):
    return CudaRecorder(torch.device("cuda", 0))


def test_a_step_apart_waits_for_what_was_given_and_is_waited_for(cuda, recorder):
    assert recorder.apart(lambda: cuda.events.append("compute") or 7) == 7
    assert cuda.taken() == [
        "side waits for current",
        "in side",
        "compute",
        "out of side",
        "current waits for side",
    ]


def test_recordings_share_their_memory_and_leave_other_threads_alone(cuda, recorder):
    replays = [recorder.record(lambda n=n: n)[1] for n in range(2)]
    assert cuda.taken() == [
        "record in side with None, errors thread_local",
        "recorded",
        "record in side with memory of 0, errors thread_local",
        "recorded",
    ]
    for replay in replays:
        replay()
    assert cuda.taken() == ["replay 0", "replay 1"]
    recorder.forget()
    recorder.record(lambda: 3)
    assert cuda.taken() == ["empty", "record in side with None, errors thread_local", "recorded"]


def test_a_failed_recording_leaves_a_generator_that_can_be_seeded(cuda, recorder):
    def fails():
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        recorder.record(fails)
    assert cuda.taken()[-2:] == ["recorded", "generator fresh"]
    recorder.record(lambda: 1)
    assert cuda.taken()[0] == "record in side with None, errors thread_local"


def test_torch_takes_what_it_is_asked():
    asked = {"pool", "stream", "capture_error_mode"}
    assert asked <= inspect.signature(torch.cuda.graph.__init__).parameters.keys()
    assert {"graphsafe_get_state", "graphsafe_set_state"} <= set(dir(torch.Generator))
    assert {"pool", "replay"} <= set(dir(torch.cuda.CUDAGraph))
