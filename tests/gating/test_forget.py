"""A step begins without the autograd graph of the one before: a captured graph must not use its nodes."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import gatedconv
from gatedconv import ChannelGate, LayerGate
from gatedconv.gating import forget


def accumulator(parameter):
    """The node that accumulates a parameter's gradient: made when needed, and gone with the graphs that use it."""
    return parameter.view_as(parameter).grad_fn.next_functions[0][0]


def residual():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(1, 3, 3, padding=1)
            self.body = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1))

        def forward(self, x):
            x = self.stem(x)
            return x + self.body(x)

    model = gatedconv.gate_model(Net().train(), "layer", example_input=torch.randn(2, 1, 6, 6))
    return model, model.stem


def resnet():
    model = gatedconv.models.ResNet(8, 3, "both", input_size=(1, 6, 6))
    return model, model.conv1


@pytest.mark.parametrize("build", [resnet, residual])
def test_the_first_layer_of_a_step_finds_no_node_of_the_last(build):
    model, first = build()
    model.train()
    model(torch.randn(4, 1, 6, 6)).sum().backward()
    assert "last step" not in accumulator(first.weight).metadata
    accumulator(first.weight).metadata["last step"] = True
    found = []
    first.register_forward_hook(lambda *_: found.append("last step" in accumulator(first.weight).metadata))
    model(torch.randn(4, 1, 6, 6)).sum().backward()
    model.eval()
    assert found == [False]


@pytest.mark.parametrize("gate", [LayerGate(3), ChannelGate(3, hidden=None)])
def test_a_gate_called_again_has_new_nodes(gate):
    gate(torch.randn(4, 3, 2, 2)).sum().backward()
    accumulator(gate.fc2.weight).metadata["last step"] = True
    gate(torch.randn(4, 3, 2, 2))
    assert "last step" not in accumulator(gate.fc2.weight).metadata


def test_forgetting_leaves_constants_and_what_is_learnt():
    model = gatedconv.models.ResNet(8, 3, "both", input_size=(1, 6, 6)).train()
    model(torch.randn(4, 1, 6, 6))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    forget(model)
    assert all(gate.open_rate is None and gate.logits is None for gate in gatedconv.gates(model).values())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    frozen = gatedconv.freeze(model)
    forget(frozen)
    assert all(gate.open_rate is not None for gate in gatedconv.gates(frozen).values())


def test_a_gate_that_is_replaced_between_steps_is_reset_too():
    model = gatedconv.models.ResNet(8, 3, "layer", input_size=(1, 6, 6)).train()
    model(torch.randn(4, 1, 6, 6))
    new = LayerGate(16)
    model.layer1[0].layer_gate = new
    model(torch.randn(4, 1, 6, 6))
    assert new.open_rate is not None
    forget(model)
    assert new.open_rate is None and new.logits is None


def test_a_trained_model_with_a_pruner_is_freed():
    model = gatedconv.models.ResNet(8, 3, "both", input_size=(1, 6, 6)).train()
    pruner = gatedconv.GatePruner(model)
    model(torch.randn(4, 1, 6, 6))
    loss = gatedconv.polarization_loss(model)
    (loss + gatedconv.mac_target_loss(model) + gatedconv.activation_loss(model, "macs")).backward()
    pruner.prune(0.9)
    dead = weakref.ref(model)
    del model, loss
    gc.collect()
    assert dead() is None
    with pytest.raises(RuntimeError, match="no longer exists"):
        pruner.prune(0.9)
