"""What a step launches, allocates and waits for, counted on the launchers without a GPU."""

from __future__ import annotations

import os

import pytest
import torch

import gatedconv
from gatedconv import ops
from gatedconv.models import ResNet
from gatedconv.ops import _triton
from tests.kernels.recording import gate_step, recorded

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted here")

KINDS = ("layer 16x32x32", "channel 16x32x32", "channel 64x8x8", "channel 256x2x2", "flatten 32x16x16")
WAITS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "lift_fresh", "_to_copy", "scalar_tensor"}


def make_gate(kind, hidden, estimator):
    name, shape = kind.split()
    channels, size, _ = map(int, shape.split("x"))
    options = {"hidden": hidden, "estimator": estimator}
    if name == "flatten":
        options |= {"pool": "flatten", "feature_size": size * size}
    make = gatedconv.LayerGate if name == "layer" else gatedconv.ChannelGate
    return make(channels, **options).train(), torch.zeros(256, channels, size, size, requires_grad=True)


def recording_of(step):
    with recorded():
        step()  # counters are made once
    with recorded() as recording:
        step()
    return recording


@pytest.mark.parametrize("estimator", ops.ESTIMATORS)
@pytest.mark.parametrize("hidden", [16, None])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_takes_at_most_four_launches(kind, hidden, estimator):
    gate, x = make_gate(kind, hidden, estimator)
    recording = recording_of(gate_step(gate, x))
    assert 3 <= recording.count <= 4, recording
    assert set(recording.operators) <= {"rand"}, recording


@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_allocates_outputs_and_what_backward_needs(kind):
    gate, x = make_gate(kind, 16, "ste")
    allocated = sum(size for _, size in recording_of(gate_step(gate, x)).allocated)
    gradients = sum(p.numel() for p in gate.parameters()) + (x.numel() if kind.startswith("flatten") else 0)
    # Per sample: pooled features and their gradient, gates and logits, a few rows of hidden units.
    rows = 256 * (2 * x.shape[1] + 2 * gate.num_gates + 12 * 16)
    assert allocated <= 4 * (gradients + rows)


@pytest.mark.parametrize("noisy", [False, True])
def test_what_one_program_cannot_finish_soon_gets_a_launch(noisy):
    gate = gatedconv.ChannelGate(1024, estimator="gumbel" if noisy else "ste").train()
    recording = recording_of(gate_step(gate, torch.zeros(1024, 1024, 1, 1, requires_grad=True)))
    assert [launch.name for launch in recording.launches][:2] == ["gate_pool_dense", "gate_tail"]
    assert recording.count == 4 + noisy


def test_no_program_of_a_backward_goes_through_more_than_its_share():
    """A thousand gates on a thousand samples: rows and gates are shared out, nothing is a program's alone."""
    gate = gatedconv.ChannelGate(1024).train()
    launches = recording_of(gate_step(gate, torch.zeros(1024, 1024, 1, 1, requires_grad=True))).launches
    rows, dense = launches[-2:]
    tile = rows.arguments
    assert rows.grid == (1024 // tile["BLOCK_N"] + 1024 // tile["BLOCK_O"],)
    assert dense.grid[0] * dense.arguments["BLOCK_K"] >= 1024 and dense.grid[0] * dense.grid[1] >= 132


@pytest.mark.parametrize(("gates", "launches"), [("layer", 3 + 3), ("channel", 3 + 3 + 1 + 2)])
def test_launches_of_a_block_end(gates, launches):
    block = ResNet(8, 3, gates).layer1[0].train()
    recording = recording_of(lambda: block(torch.zeros(256, 16, 32, 32)).sum().backward())
    names = [launch.name for launch in recording.launches]
    own = [name for name in names if not name.startswith("gate_p")]  # a layer gate reads the block's input
    own = [name for name in own if gates == "channel" or not name.startswith("gate_")]
    assert len(own) == launches, names
    norms = [name for name in recording.operators if "batch_norm" in name]
    assert len(norms) == 2, "bn1 forward and backward, and no other"


@pytest.mark.parametrize("gate", ["layer", "channel", "both"])
@pytest.mark.parametrize("estimator", ["ste", "gumbel"])
def test_a_training_step_never_waits_for_the_device(gate, estimator):
    """Nothing is read back and nothing is copied from the host: the step can be captured."""
    model = ResNet(8, 3, gate, input_size=(1, 8, 8), estimator=estimator).train()
    x, labels = torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])

    def step():
        loss = torch.nn.functional.cross_entropy(model(x), labels)
        loss = loss + gatedconv.polarization_loss(model) + gatedconv.mac_target_loss(model)
        (loss + gatedconv.activation_loss(model, weight="macs")).backward()

    recording = recording_of(step)
    assert recording.launches and not WAITS & set(recording.operators), WAITS & set(recording.operators)


def test_a_repeated_step_launches_the_same():
    model = ResNet(8, 3, "both", input_size=(1, 8, 8)).train()
    first, second = (recording_of(lambda: model(torch.zeros(4, 1, 8, 8)).sum().backward()) for _ in range(2))
    assert [launch.name for launch in first.launches] == [launch.name for launch in second.launches]


def test_no_kernel_adds_floats_atomically():
    """The one atomic is the integer counter: sums keep their order."""
    import inspect

    import gatedconv.kernels as kernels

    sources = {}
    for path in os.listdir(os.path.dirname(inspect.getfile(kernels))):
        if path.endswith(".py"):
            with open(os.path.join(os.path.dirname(inspect.getfile(kernels)), path)) as file:
                sources[path] = file.read()
    found = {path: text.count("tl.atomic") for path, text in sources.items() if "tl.atomic" in text}
    assert found == {"gate_tail.py": 1} and "tl.atomic_add(ticket_ptr, 1" in sources["gate_tail.py"]


@pytest.mark.parametrize(("variable", "devices"), [(None, ("cuda",)), ("auto", ("cuda",)), ("off", ())])
def test_kernels_are_chosen_on_cuda_unless_turned_off(monkeypatch, variable, devices):
    monkeypatch.delenv("GATEDCONV_TRITON", raising=False)
    if variable:
        monkeypatch.setenv("GATEDCONV_TRITON", variable)
    assert _triton._devices() == devices
    assert not ops.kernels_run_on(torch.zeros(1))


@pytest.mark.parametrize("gate", ["layer", "channel"])
@pytest.mark.parametrize("position", ["before", "middle", "after"])
def test_networks_take_kernels_by_themselves(gate, position):
    model = ResNet(8, 3, gate, position, input_size=(1, 8, 8)).train()
    recording = recording_of(lambda: model(torch.zeros(4, 1, 8, 8)).sum().backward())
    names = {launch.name for launch in recording.launches}
    assert {"gate_backward_rows", "gate_backward_dense"} <= names
    fused = gate == "layer" or position == "after"
    assert ("residual_forward" in names) == fused and ("gated_scale_forward" in names) == (not fused)
