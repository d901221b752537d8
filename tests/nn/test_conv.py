"""gatedconv.Conv2d as the drop-in for torch.nn.Conv2d, and with a gate."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

import gatedconv
from tests.tolerances import assert_close

CONFIGURATIONS = [
    dict(kernel_size=3),
    dict(kernel_size=(3, 1), stride=(2, 1), padding=(1, 0)),
    dict(kernel_size=3, padding="same"),
    dict(kernel_size=2, padding="valid", dilation=2),
    dict(kernel_size=3, groups=2, bias=False),
    dict(kernel_size=3, padding=1, padding_mode="reflect"),
    dict(kernel_size=3, padding=2, padding_mode="circular"),
    dict(kernel_size=3, padding="same", padding_mode="replicate", dilation=2),
]


def pair(**arguments):
    torch.manual_seed(0)
    theirs = nn.Conv2d(4, 6, **arguments)
    torch.manual_seed(0)
    return theirs, gatedconv.Conv2d(4, 6, **arguments)


@pytest.mark.parametrize("arguments", CONFIGURATIONS)
def test_without_a_gate_it_is_torch_nn_conv2d(arguments):
    theirs, ours = pair(**arguments)
    x = torch.randn(2, 4, 9, 8, requires_grad=True)
    assert torch.equal(ours(x), theirs(x))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert ours.extra_repr() == theirs.extra_repr()
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), ours.double().float()):
        assert torch.equal(other(x), theirs(x))
    a, b = (torch.autograd.grad(m(x).sin().sum(), x, create_graph=True)[0] for m in (ours, theirs))
    assert torch.equal(a, b)
    assert torch.equal(*(torch.autograd.grad(g.square().sum(), x)[0] for g in (a, b)))


def test_the_constructor_is_torch_nn_conv2d_and_one_keyword():
    theirs = inspect.signature(nn.Conv2d.__init__).parameters
    ours = inspect.signature(gatedconv.Conv2d.__init__).parameters
    assert list(ours)[:-1] == list(theirs) and list(ours)[-1] == "gate"
    assert {n: p.default for n, p in theirs.items()} == {n: p.default for n, p in ours.items() if n != "gate"}
    with pytest.raises(ValueError):
        gatedconv.Conv2d(4, 6, 3, groups=3)
    assert gatedconv.Conv2d(4, 6, 3, device="meta", dtype=torch.float16).weight.dtype == torch.float16


def test_torch_save_and_unbatched_input():
    _, ours = pair(kernel_size=3)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    x = torch.randn(4, 9, 8)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), ours(x))


@pytest.mark.parametrize("arguments", CONFIGURATIONS)
def test_frozen_it_skips_closed_channels_exactly(arguments):
    theirs, _ = pair(**arguments)
    net = nn.Sequential(gatedconv.Conv2d(4, 6, **arguments, gate="channel"))
    net[0].load_state_dict(theirs.state_dict(), strict=False)
    mask = torch.tensor([1, 0, 0, 1, 1, 0]).bool()
    frozen = gatedconv.freeze(net, masks={"0.gate": mask}).eval()
    x = torch.randn(2, 4, 9, 8)
    expected = theirs(x) * mask.view(1, -1, 1, 1)
    assert_close(frozen(x), expected)
    assert torch.equal(frozen(x)[:, ~mask], torch.zeros_like(expected[:, ~mask]))


def test_gated_in_training_it_multiplies_its_own_output():
    torch.manual_seed(0)
    conv = gatedconv.Conv2d(4, 6, 3, gate="channel")
    torch.nn.init.normal_(conv.gate.fc2.weight)
    x = torch.randn(16, 4, 9, 9)
    out = conv(x)
    gate = conv.gate.logits > 0
    assert 0 < gate.float().mean() < 1
    plain = torch.nn.functional.conv2d(x, conv.weight, conv.bias)
    torch.testing.assert_close(out, plain * gate[:, :, None, None])
    out.square().mean().backward()
    assert conv.gate.fc1.weight.grad.abs().sum() > 0 and conv.weight.grad.abs().sum() > 0


def test_it_compiles_with_and_without_a_gate():
    for gate in (None, "channel"):
        conv = gatedconv.Conv2d(4, 6, 3, gate=gate)
        x = torch.randn(8, 4, 9, 9)
        compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
        state = copy.deepcopy(conv.state_dict())
        expected = conv(x)
        conv.load_state_dict(state)
        torch.testing.assert_close(compiled(x), expected)


def test_bad_gates_are_named():
    with pytest.raises(ValueError, match="gate must be None, 'channel' or a ChannelGate, got 'layer'"):
        gatedconv.Conv2d(4, 6, 3, gate="layer")
    with pytest.raises(TypeError, match="got LayerGate"):
        gatedconv.Conv2d(4, 6, 3, gate=gatedconv.LayerGate(6))
    with pytest.raises(ValueError, match="got in_channels=4, num_gates=4"):
        gatedconv.Conv2d(4, 6, 3, gate=gatedconv.ChannelGate(4))
    with pytest.raises(ValueError, match=r"takes \(N, C, H, W\), got shape \(4, 9, 9\)"):
        gatedconv.Conv2d(4, 6, 3, gate="channel")(torch.randn(4, 9, 9))
