"""Captures of CUDA graphs without a GPU: one at a time on a device, repeated where another thread spoiled one."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch

from gatedconv import _cuda_graph

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def captures(monkeypatch):
    """Stand-ins for PyTorch's; `.active` counts the captures under way, `.most` the most at one time."""
    state = SimpleNamespace(active=0, most=0, begun=0)

    @contextlib.contextmanager
    def graph(made, stream=None, capture_error_mode=""):
        assert capture_error_mode == "thread_local"
        state.begun += 1
        state.active += 1
        state.most = max(state.most, state.active)
        try:
            yield
        finally:
            state.active -= 1

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return state


def test_the_result_is_that_of_the_call(captures):
    assert _cuda_graph.capture(lambda: 7, DEVICE)[1] == 7


def test_captures_of_a_device_wait_for_each_other(captures):
    inside = threading.Event()

    def call():
        inside.wait(0.01)

    threads = [threading.Thread(target=_cuda_graph.capture, args=(call, DEVICE)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (captures.begun, captures.most) == (8, 1)


@pytest.mark.parametrize(("retries", "failures", "fits"), [(1, 1, True), (1, 2, False), (0, 1, False)])
def test_an_invalidated_capture_is_repeated(captures, retries, failures, fits):
    left = [failures]

    def call():
        if left[0]:
            left[0] -= 1
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        return "made"

    if fits:
        assert _cuda_graph.capture(call, DEVICE, retries=retries)[1] == "made"
    else:
        with pytest.raises(RuntimeError, match="previous error during capture"):
            _cuda_graph.capture(call, DEVICE, retries=retries)
    assert captures.begun == min(failures, retries) + 1


def test_what_no_graph_can_hold_is_raised_at_once(captures):
    def call():
        raise RuntimeError("a value was asked for")

    with pytest.raises(RuntimeError, match="a value"):
        _cuda_graph.capture(call, DEVICE)
    assert captures.begun == 1


def test_a_side_stream_waits_and_is_waited_for(monkeypatch):
    events = []

    class Stream:
        device = DEVICE

        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def stream(made):
        events.append(f"on {made.name}")
        yield

    monkeypatch.setattr(torch.cuda, "current_stream", {DEVICE: Stream("current")}.get)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    with _cuda_graph.on_stream(Stream("side")):
        events.append("launch")
    assert events == ["side waits for current", "on side", "launch", "current waits for side"]
