"""What a step launches, allocates and waits for, counted on the launchers without a GPU."""

from __future__ import annotations

import inspect
import os
import re

import pytest
import torch

import gatedconv
from gatedconv import ops
from gatedconv.models import ResNet
from gatedconv.ops import _triton
from tests.kernels.recording import KERNELS, gate_step, kernel_names, recorded

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
        step()  # constants of the losses are made in the first step
    with recorded() as recording:
        step()
    return recording


@pytest.mark.parametrize("estimator", ops.ESTIMATORS)
@pytest.mark.parametrize("hidden", [16, None])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_takes_two_launches_forward_and_two_backward(kind, hidden, estimator):
    gate, x = make_gate(kind, hidden, estimator)
    recording = recording_of(gate_step(gate, x))
    assert len(recording.launches) == 4, recording
    assert recording.operators == (["rand"] if estimator in ("gumbel", "bernoulli") else []), recording


@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_allocates_outputs_and_what_backward_needs(kind):
    gate, x = make_gate(kind, 16, "ste")
    allocated = sum(size for _, size in recording_of(gate_step(gate, x)).allocated)
    gradients = sum(p.numel() for p in gate.parameters()) + (x.numel() if kind.startswith("flatten") else 0)
    # Per sample: pooled features and their gradient, gates and logits, a few rows of hidden units.
    rows = 256 * (2 * x.shape[1] + 2 * gate.num_gates + 12 * 16)
    assert allocated <= 4 * (gradients + rows)


def test_no_program_of_a_backward_goes_through_more_than_its_share():
    """A thousand gates on a thousand samples: rows and gates are shared out, nothing is a program's alone."""
    gate = gatedconv.ChannelGate(1024).train()
    launches = recording_of(gate_step(gate, torch.zeros(1024, 1024, 1, 1, requires_grad=True))).launches
    rows, dense = launches[-2:]
    tile = rows.arguments
    assert rows.grid == (1024 // tile["BLOCK_N"] + 1024 // tile["BLOCK_O"],)
    assert dense.grid[0] * dense.arguments["BLOCK_K"] >= 1024 and dense.grid[0] * dense.grid[1] >= 132


@pytest.mark.parametrize(("gates", "launches"), [("layer", 3 + 3), ("channel", 3 + 3 + 2 + 2)])
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


def test_no_kernel_adds_atomically():
    """Atomic additions would come in any order; sums keep theirs."""
    sources = {path.name: path.read_text() for path in KERNELS.glob("*.py")}
    assert len(sources) > 3 and not [name for name, text in sources.items() if "tl.atomic" in text]


ELEMENTWISE = {"gated_scale_forward", "residual_backward"}


def test_whatever_sums_is_launched_without_fused_multiply_adds():
    """With them the lanes that hold copies of a sum disagree in the last bit: see ``FIXED_ORDER``."""
    launches = []
    for gate, position in (("both", "after"), ("channel", "middle")):
        model = ResNet(8, 3, gate, position, input_size=(1, 8, 8)).train()
        launches += recording_of(lambda model=model: model(torch.zeros(4, 1, 8, 8)).sum().backward()).launches
    for kind, hidden in (("channel 256x2x2", None), ("flatten 32x16x16", 16)):
        launches += recording_of(gate_step(*make_gate(kind, hidden, "ste"))).launches
    assert {launch.name for launch in launches} == kernel_names()
    for launch in launches:
        sums = launch.name not in ELEMENTWISE
        assert sums == any("tl.sum(" in source or "tl.dot(" in source for source in sources_of(launch.kernel))
        assert launch.options.get("enable_fp_fusion", True) != sums, launch.name
        # Triton 3.6 takes a 1 in a tuple within a tuple for None.
        inner = (part for value in launch.arguments.values() if isinstance(value, tuple) for part in value)
        assert not any(isinstance(x, int | float) for part in inner if isinstance(part, tuple) for x in part), launch


def sources_of(kernel, seen=None):
    """Source of a kernel and of the functions that it calls."""
    seen = {} if seen is None else seen
    if kernel.fn not in seen:
        seen[kernel.fn] = inspect.getsource(kernel.fn)
        for name in re.findall(r"\b(\w+)\(", seen[kernel.fn]):
            called = kernel.fn.__globals__.get(name)
            if hasattr(called, "fn"):
                sources_of(called, seen)
    return seen.values()


def test_programs_that_sum_over_the_batch_fill_the_device(monkeypatch):
    """Four programs a multiprocessor, of 132 as on an H100 where there is no GPU, else of the GPU's own."""
    from gatedconv.kernels import gated_residual as kernels

    x = torch.zeros(1024, 16, 32, 32).contiguous(memory_format=torch.channels_last)
    assert kernels.batch_grid(x)[0] == 512  # two samples a program: 528 programs at most
    monkeypatch.setattr(kernels, "multiprocessors", lambda _: 40)
    assert kernels.batch_grid(x)[0] == 147  # seven samples a program: 160 at most


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
