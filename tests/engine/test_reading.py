"""What an engine must not read off a model's types alone: hooks, overridden forwards, defaults, shared memory."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gatedconv
from tests.tolerances import relative_error, tolerance


class Doubling(gatedconv.Conv2d):
    """A subclass with weights of its own making."""

    def forward(self, x):
        return F.conv2d(x, 2 * self.weight, self.bias, self.stride, self.padding)


class Optional(nn.Module):
    """A second input with a default, and one that decides the way."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x, other=None, *, twice=False):
        x = self.conv(x) if other is None else other
        return 2 * x if twice else x


class Overwriting(nn.Module):
    """A view that is read after what it views was written in place."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        x = F.adaptive_avg_pool2d(self.conv(x), 1)
        vector = torch.flatten(x, 1)
        x.relu_()
        return self.linear(vector)


def hooked(where, pre=False):
    """A net with a hook on one of its modules, "" for the net itself."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout(), nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3)))
    module = net.get_submodule(where)
    if pre:
        module.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    else:
        module.register_forward_hook(lambda module, inputs, output: 2 * output)
    return net


def own_forward():
    net = nn.Sequential(nn.Conv2d(3, 8, 3))
    net[0].forward = lambda x: F.conv2d(x, 2 * net[0].weight)
    return net


MODELS = {
    "a hook": lambda: hooked("0"),
    "a hook before": lambda: hooked("0", pre=True),
    "a hook on what does nothing": lambda: hooked("1"),
    "a hook on a container": lambda: hooked("2"),
    "a hook on the model": lambda: hooked(""),
    "a hook before the model": lambda: hooked("", pre=True),
    "a subclass": lambda: nn.Sequential(Doubling(3, 8, 3), nn.ReLU()),
    "a forward of its own": own_forward,
    "defaults": Optional,
    "a view overwritten": Overwriting,
}


@pytest.mark.parametrize("name", MODELS)
def test_the_engine_computes_what_the_model_does(name):
    torch.manual_seed(5)
    net = MODELS[name]().eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = copy.deepcopy(net)(x)
    engine = gatedconv.Engine(net, x)
    assert engine.reason is None
    assert relative_error(engine(x), expected) <= tolerance()


def test_a_model_of_two_inputs_is_refused_and_nothing_printed(capfd):
    class Sum(nn.Module):
        def forward(self, x, y):
            return x + y

    engine = gatedconv.Engine(Sum(), torch.zeros(1, 3, 4, 4))
    assert "cannot trace" in engine.reason

    class Failing(nn.Module):
        def forward(self, x):
            return x.view(7, 7)

    assert "cannot trace" in gatedconv.Engine(Failing(), torch.zeros(1, 3, 4, 4)).reason
    assert capfd.readouterr() == ("", "")
