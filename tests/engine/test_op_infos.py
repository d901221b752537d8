"""Every native operation against the samples with which PyTorch tests its own operators."""

import pytest
import torch
from torch import nn

import gatedconv
from tests.engine.nets import error
from tests.tolerances import tolerance

pytestmark = pytest.mark.slow  # PyTorch's table alone takes seconds to make

FUNCTIONAL = (
    "relu relu6 leaky_relu elu silu hardswish hardsigmoid gelu mish conv2d linear batch_norm layer_norm max_pool2d "
    "avg_pool2d adaptive_avg_pool2d interpolate pixel_shuffle pad group_norm prelu"
)
NAMES = [f"nn.functional.{name}" for name in FUNCTIONAL.split()]
NAMES += "sigmoid tanh cat split chunk softmax add mul sub div mean flatten permute".split()
BY_ELEMENT = "relu relu6 leaky_relu elu silu hardswish hardsigmoid gelu mish sigmoid tanh".split()
MOST = 40  # samples of an operation: some have hundreds of shapes that are no maps


class Applied(nn.Module):
    """The operation on what a 1x1 convolution makes of the input; other tensors are constants of the model."""

    def __init__(self, op, channels, args, kwargs):
        super().__init__()
        self.conv, self.op = nn.Conv2d(channels, channels, 1), op
        self.args, self.kwargs, self.names = args, kwargs, {}
        for at, value in [*enumerate(args), *kwargs.items()]:
            if isinstance(value, torch.Tensor):
                self.register_buffer(f"constant_{at}", value.detach())
                self.names[at] = f"constant_{at}"

    def forward(self, x):
        args = [getattr(self, self.names[at]) if at in self.names else value for at, value in enumerate(self.args)]
        kwargs = {at: getattr(self, self.names[at]) if at in self.names else v for at, v in self.kwargs.items()}
        return self.op(self.conv(x), *args, **kwargs)


def samples(table, name):
    for info in table:
        if name in (info.name, f"{info.name}.{info.variant_test_name}") and not info.variant_test_name:
            for sample in info.sample_inputs("cpu", torch.float32):
                if name.rpartition(".")[2] in BY_ELEMENT and sample.input.numel():  # of any shape: a map of one channel
                    sample.input = sample.input.reshape(1, 1, 1, -1)
                fits = (
                    isinstance(sample.input, torch.Tensor) and sample.input.dim() == 4 and min(sample.input.shape) > 0
                )
                if fits and bool(sample.input.isfinite().all()):
                    yield info.op, sample


@pytest.fixture
def table(monkeypatch):
    """PyTorch's table of operators. Importing it freezes the flags of the backends; that is undone at the end."""
    monkeypatch.setitem(torch.backends.flags_frozen.__globals__, "__allow_nonbracketed_mutation_flag", True)
    pytest.importorskip("expecttest")  # PyTorch's test utilities import it
    return pytest.importorskip("torch.testing._internal.common_methods_invocations").op_db


@pytest.mark.parametrize("name", NAMES)
def test_samples_of_pytorch(table, name):
    torch.manual_seed(20)
    found = 0
    for op, sample in samples(table, name):
        try:
            net = Applied(op, sample.input.shape[1], sample.args, sample.kwargs).eval()
            x = sample.input.detach()
            expected = net(x)
        except Exception:  # a sample that is meant to fail, or that no convolution can stand in front of
            continue
        if not isinstance(expected, torch.Tensor) or not bool(expected.isfinite().all()) or expected.numel() == 0:
            continue
        engine = gatedconv.Engine(net, x, verify=False)
        result = engine(x)
        assert result.shape == expected.shape
        if float(expected.abs().max()) > 0:
            assert error(result, net, x) <= tolerance(), (sample, engine.describe())
        found += 1
        if found == MOST:
            break
    if not found:
        pytest.skip("no sample is a map of finite values")
