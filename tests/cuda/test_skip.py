"""A layer gate's decision that never comes to the host gives what taking the open samples out gives."""

import types

import pytest
import torch

import gatedconv
from gatedconv.nn import block, skip
from tests.engine.nets import settle
from tests.tolerances import relative_error, tolerance


@pytest.fixture
def on_device(monkeypatch):
    """Let blocks on the CPU take the way of the GPU; counts how often."""
    calls = []

    def branch(*arguments):
        calls.append(arguments)
        return skip.residual_branch(*arguments)

    monkeypatch.setattr(block, "residual_branch", branch)
    monkeypatch.setattr(block, "decides_on_device", lambda *arguments: not torch.is_grad_enabled())
    return calls


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("bias", [-9.0, 0.0, 9.0])
def test_a_whole_network(shortcut, bias, on_device):
    torch.manual_seed(0)
    model = settle(gatedconv.models.resnet20(gate="layer", shortcut=shortcut))
    with torch.no_grad():
        for gate in gatedconv.gates(model).values():
            torch.nn.init.normal_(gate.fc2.weight, std=3.0)
            gate.fc2.bias.fill_(bias)
    x = torch.randn(6, 3, 16, 20)
    expected = model(x).detach()  # with gradients the samples are taken out
    assert not on_device
    with torch.no_grad():
        result = model(x)
    assert len(on_device) == 9
    opened = torch.cat([arguments[2] for arguments in on_device])
    assert bool(opened.any()) == (bias > -9) and bool((~opened).any()) == (bias < 9)
    assert relative_error(result, expected) <= tolerance()


def test_a_closed_sample_is_not_computed(on_device):
    """Its NaN stays in its own shortcut, and its branch would have made more of it."""
    torch.manual_seed(0)
    model = settle(gatedconv.models.resnet20(gate="layer")).layer1[0]
    x = torch.rand(3, 16, 8, 8)
    x[1, 2, 3, 4] = float("nan")
    is_open = torch.tensor([True, False, True])
    with torch.no_grad():
        out = skip.residual_branch(x, x, is_open, (model.conv1, model.bn1), (model.conv2, model.bn2))
    assert torch.equal(out[1].isnan(), x[1].isnan()) and torch.equal(out[1].nan_to_num(), x[1].relu().nan_to_num())
    assert bool(out[::2].isfinite().all()) and not torch.equal(out[0], x[0].relu())


def test_by_default_nothing_changes():
    model = settle(gatedconv.models.resnet20(gate="layer")).layer1[0]
    convs = (model.conv1, model.bn1), (model.conv2, model.bn2)
    with torch.no_grad():
        assert not skip.decides_on_device(torch.zeros(1, 16, 8, 8), *convs)


@pytest.mark.parametrize("position", ["before", "middle", "after"])
@pytest.mark.parametrize("estimator", ["ste", "batch_mean"])
def test_channel_gates_decide_for_each_sample_what_is_read(position, estimator, monkeypatch):
    torch.manual_seed(0)
    model = settle(gatedconv.models.resnet20(gate="channel", position=position, estimator=estimator))
    with torch.no_grad():
        for gate in gatedconv.gates(model).values():
            torch.nn.init.normal_(gate.fc2.weight, std=3.0)
    x = torch.randn(5, 3, 16, 12)
    expected = model(x).detach()
    masks = []

    def conv(input, weight, bias, out_open, in_open=None, **options):
        if in_open is not None:
            masks.append(in_open)
            input = torch.where(in_open[:, :, None, None], input, float("nan"))  # nobody may read it
        return gatedconv.ops.masked_conv2d(input, weight, bias, out_open, in_open, **options)

    monkeypatch.setattr(skip, "ops", types.SimpleNamespace(masked_conv2d=conv))
    monkeypatch.setattr(block, "decides_on_device", lambda *arguments: not torch.is_grad_enabled())
    with torch.no_grad():
        result = model(x)
    assert len(masks) == (0 if position == "after" else 9)
    if masks:
        assert all(mask.shape[0] == 5 for mask in masks) and any(len(mask.unique(dim=0)) > 1 for mask in masks)
    assert relative_error(result, expected) <= tolerance()
