"""What an engine must not read off a model's types alone: hooks, overridden forwards, defaults, shared memory."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import gatedconv
from gatedconv.convert.verify import tensors_of
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


class Writing(nn.Module):
    """A map that is read after a view of it was written in place, and a part of it that was made before."""

    def __init__(self, write):
        super().__init__()
        self.conv, self.write = nn.Conv2d(3, 8, 3), write

    def forward(self, x):
        y = self.conv(x)
        part = y.transpose(2, 3)[:, 1:7]
        self.write(y)
        return torch.sigmoid(y).mean((2, 3)), part


def write_by_index(y):
    y[:, 3] = 0.5
    y[:, 4:6, 1:] *= 2


class Numbers(nn.Module):
    """Constants that the code makes and changes in place."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        scale = torch.arange(8.0)
        scale += 1
        scale[2:4] = 7
        return self.conv(x) * scale[:, None, None]


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
    "a slice overwritten": lambda: Writing(lambda y: y[:, 2:5].relu_()),
    "a part overwritten": lambda: Writing(lambda y: y.chunk(2, 1)[1].add_(1)),
    "a channel overwritten": lambda: Writing(lambda y: y.select(1, -1).zero_()),
    "groups overwritten": lambda: Writing(lambda y: y.view(len(y), 2, 4, *y.shape[2:])[:, 1].mul_(2)),
    "values set by index": lambda: Writing(write_by_index),
    "constants changed in place": Numbers,
    "weight norm": lambda: nn.Sequential(weight_norm(nn.Conv2d(3, 8, 3)), nn.ReLU()),
    "spectral norm": lambda: nn.Sequential(spectral_norm(nn.Conv2d(3, 8, 3)), nn.ReLU()),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_engine_computes_what_the_model_does(name):
    torch.manual_seed(5)
    net = MODELS[name]().eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = copy.deepcopy(net)(x)
    engine = gatedconv.Engine(net, x)
    assert engine.reason is None and engine.fixed_size is None
    for found, wanted in zip(tensors_of(engine(x)), tensors_of(expected), strict=True):
        assert relative_error(found, wanted) <= tolerance()


def test_a_model_of_two_inputs_is_refused_and_nothing_printed(capfd):
    class Sum(nn.Module):
        def forward(self, x, y):
            return x + y

    with pytest.raises(ValueError, match="Engine: Sum does not run on example_input .*TypeError"):
        gatedconv.Engine(Sum(), torch.zeros(1, 3, 4, 4))

    class Failing(nn.Module):
        def forward(self, x):
            return x.view(7, 7)

    with pytest.raises(ValueError, match="Engine: Failing does not run on example_input .*RuntimeError"):
        gatedconv.Engine(Failing(), torch.zeros(1, 3, 4, 4))
    assert capfd.readouterr() == ("", "")
