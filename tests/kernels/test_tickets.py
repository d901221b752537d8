"""The counters of one-launch forwards: whose they are, and where they are made."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from gatedconv.kernels import ticket as tickets

from gatedconv import ops
from tests.kernels.recording import recorded

pytest.importorskip("triton")


@pytest.fixture
def device(monkeypatch):
    """A GPU as far as counters can tell: a current stream, and whether it is being captured."""
    state = SimpleNamespace(stream=1, capturing=False, made=0)
    zeros = torch.zeros

    def make(*size, device, dtype):
        assert not state.capturing, "memory made in a capture belongs to the graph"
        state.made += 1
        return zeros(*size, dtype=dtype)

    monkeypatch.setattr(tickets, "_of_streams", {})
    monkeypatch.setattr(tickets, "_free", {})
    monkeypatch.setattr(tickets, "_made", [])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=state.stream))
    monkeypatch.setattr(torch, "zeros", make)
    state.x = SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=0))
    return state


def test_launches_of_a_stream_share_a_counter_and_streams_do_not(device):
    first, again = tickets.ticket(device.x), tickets.ticket(device.x)
    device.stream = 2
    assert first is again and tickets.ticket(device.x) is not first


def test_each_captured_launch_has_a_counter_of_its_own_made_before(device):
    eager = tickets.ticket(device.x)
    device.capturing = True
    captured = [tickets.ticket(device.x) for _ in range(60)]
    assert len({t.data_ptr() for t in [eager, *captured]}) == 61
    assert all(t.data_ptr() % 16 == 0 and t.dtype == torch.int32 for t in captured), "what the eager launch was given"


def test_a_capture_without_counters_gets_none(device, monkeypatch):
    device.capturing = True
    assert tickets.ticket(device.x) is None
    device.capturing = False
    monkeypatch.setattr(tickets, "SLOTS", 2)
    tickets.ticket(device.x)
    device.capturing = True
    assert [tickets.ticket(device.x) is None for _ in range(3)] == [False, False, True]
    device.capturing = False
    tickets.ticket(device.x)  # an eager launch makes new ones
    device.capturing = True
    assert tickets.ticket(device.x) is not None


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted here")
def test_memory_of_counters_outlives_the_captures_that_took_them(device, monkeypatch):
    """A replay reads and writes a counter long after its tensor is gone."""
    monkeypatch.setattr(tickets, "SLOTS", 2)
    tickets.ticket(device.x)
    pointers = {free.untyped_storage().data_ptr() for free in tickets._free[0]}
    device.capturing = True
    while tickets.ticket(device.x) is not None:
        pass
    assert pointers and pointers <= {made.untyped_storage().data_ptr() for made in tickets._made}


def test_without_a_counter_the_tail_is_a_launch(monkeypatch):
    from gatedconv.kernels import gate_launch

    from tests.kernels.test_launches import make_gate

    gate, x = make_gate("layer 16x32x32", 16, "ste")
    monkeypatch.setattr(gate_launch, "ticket", lambda _: None)
    with recorded() as recording:
        gate(x)
    assert [launch.name for launch in recording.launches] == ["gate_pool_dense", "gate_tail"]
    assert recording.launches[0].arguments["TICKET"] is False


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted here")
def test_the_operator_of_a_compiled_graph_uses_no_counter():
    """Its memory is a compiled graph's, and may be another tensor's at the next call."""
    from gatedconv.ops import _gate_library
    from tests.ops.test_gate import make, operator_arguments

    arguments = operator_arguments(torch.zeros(6, 3, 2, 2), *make(), ops.GateOptions())
    with recorded() as recording:
        _gate_library._forward_cuda(*arguments)
    assert [launch.name for launch in recording.launches] == ["gate_pool_dense", "gate_tail"]
    assert not recording.operators
