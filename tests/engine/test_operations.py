"""Every operation of the native plan over a grid of shapes: one pixel, one channel, odd sizes, empty batches."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gatedconv
from tests.engine.nets import error, settle
from tests.tolerances import tolerance


class Between(nn.Module):
    """A convolution, a function, a convolution."""

    def __init__(self, function, channels=3, width=16, after=None, kernel=1):
        super().__init__()
        self.before = nn.Conv2d(channels, width, kernel, padding=kernel // 2)
        self.after = nn.Conv2d(after or width, 5, kernel, padding=kernel // 2)
        self.function = function
        if isinstance(function, nn.Module):
            self.module = function

    def forward(self, x):
        return self.after(self.function(self.before(x)))


class SqueezeExcite(nn.Module):
    def __init__(self, channels, gate=torch.sigmoid):
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)
        self.gate = gate

    def forward(self, x):
        return x * self.gate(self.up(F.silu(self.down(x.mean((2, 3), keepdim=True)))))


def prelu(channels):
    module = nn.PReLU(channels)
    nn.init.uniform_(module.weight, -1, 1)
    return module


def norm(module):
    nn.init.uniform_(module.weight, 0.5, 1.5)
    nn.init.uniform_(module.bias, -0.5, 0.5)
    return module


class Constants(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(channels, 1, 1) + 0.5)
        self.register_buffer("shift", torch.randn(1, channels, 1, 1))

    def forward(self, x):
        return ((x - 0.5) / 3) * self.scale + self.shift


class ByPixel(nn.Module):
    """What ConvNeXt does with the axes permuted."""

    def __init__(self, channels):
        super().__init__()
        self.norm, self.up, self.down = norm(nn.LayerNorm(channels)), nn.Linear(channels, 20), nn.Linear(20, channels)

    def forward(self, x):
        return self.down(F.gelu(self.up(self.norm(x.permute(0, 2, 3, 1))))).permute(0, 3, 1, 2) + x


class Calls(nn.Module):
    """Layers written as calls, with weights that are computed from parameters."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(channels, 4, 3, 3)), nn.Parameter(torch.randn(channels))
        self.norm, self.gain = norm(nn.BatchNorm2d(channels)), nn.Parameter(torch.rand(channels))
        self.channels = channels
        settle(self)

    def forward(self, x):
        n = self.norm
        standard = F.batch_norm(self.weight.reshape(1, self.channels, -1), None, None, training=True)
        x = F.conv2d(F.pad(x, (0, 2, 1, 0)), standard.view_as(self.weight), self.bias, 1, 0, groups=4)
        x = F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, False, 0.1, n.eps)
        return F.silu(x).mul(self.gain.reshape(1, -1, 1, 1))


class CallsByPixel(nn.Module):
    """As ByPixel, without layers."""

    def __init__(self, channels):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(channels)), nn.Parameter(torch.rand(channels))
        self.up, self.bias = nn.Parameter(torch.randn(20, channels)), nn.Parameter(torch.randn(20))
        self.down = nn.Parameter(torch.randn(channels, 20))

    def forward(self, x):
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.scale.shape, self.scale, self.shift)
        return F.linear(F.gelu(F.linear(y, self.up, self.bias)), self.down).permute(0, 3, 1, 2) + x


class Vectors(nn.Module):
    """Squeeze and excitation by linear layers that are calls."""

    def __init__(self, channels):
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(4, channels)), nn.Parameter(torch.randn(channels, 4))
        self.bias = nn.Parameter(torch.randn(channels))

    def forward(self, x):
        y = F.relu(F.linear(F.adaptive_avg_pool2d(x, 1).squeeze((2, 3)), self.down))
        return x * torch.sigmoid(F.linear(y, self.up, self.bias))[:, :, None, None]


def split_from_the_end(x):
    a, b = x.split(8, 1)[-1], torch.split(x, 8, 1)[-2]
    return torch.cat([a, b], 1)


def dense(x):
    a = torch.cat([x, F.relu(x)], 1)
    b = torch.cat([x, F.relu(x), torch.tanh(a[:, :16])], 1)
    return torch.cat([a, b], 1)


def split_and_join(x):
    a, b = x.chunk(2, 1)
    c = torch.tanh(b)
    return torch.cat([a, b, c, torch.sigmoid(c)], 1)


def uneven(x):
    a, b, c = x.split([1, 6, 9], 1)
    return torch.cat([torch.tanh(c), b, a, x], 1)


def shuffle(x):
    n, c, h, w = x.size()
    return x.view(n, 4, c // 4, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def shuffle_halves(x):
    a, b = x.chunk(2, dim=1)
    return F.channel_shuffle(torch.cat((a, torch.relu(b)), 1), 2)


def down_and_up(mode, corners=None):
    def run(x):
        y = F.interpolate(F.avg_pool2d(x, 2, ceil_mode=False), size=x.shape[-2:], mode=mode, align_corners=corners)
        return x + y

    return run


# Name -> (function of a map of 16 channels, channels that it returns).
FUNCTIONS = {
    "squeeze-excite": (lambda: SqueezeExcite(16), 16),
    "squeeze-excite, hard": (lambda: SqueezeExcite(16, F.hardsigmoid), 16),
    "prelu": (lambda: prelu(16), 16),
    "prelu of one slope": (lambda: prelu(1), 16),
    "constants": (lambda: Constants(16), 16),
    "product of two maps": (lambda: lambda x: x * torch.tanh(x), 16),
    "product with one channel": (lambda: lambda x: x * torch.sigmoid(x[:, :1]), 16),
    "sum with one pixel": (lambda: lambda x: F.adaptive_avg_pool2d(x, 1) + x, 16),
    "dense block": (lambda: dense, 80),
    "chunk and cat": (lambda: split_and_join, 32),
    "uneven split": (lambda: uneven, 32),
    "channel slice": (lambda: lambda x: x[:, 3:9] + x[:, 7:13], 6),
    "channel shuffle": (lambda: shuffle, 16),
    "channel shuffle of halves": (lambda: shuffle_halves, 16),
    "nearest": (lambda: nn.Upsample(scale_factor=2), 16),
    "nearest by 3": (lambda: lambda x: F.interpolate(x, scale_factor=3), 16),
    "bilinear": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), 16),
    "bilinear, corners": (lambda: nn.Upsample(scale_factor=(2, 3), mode="bilinear", align_corners=True), 16),
    "nearest to a size": (lambda: down_and_up("nearest"), 16),
    "bilinear to a size": (lambda: down_and_up("bilinear", False), 16),
    "pixel shuffle": (lambda: nn.PixelShuffle(2), 4),
    "max pool": (lambda: nn.MaxPool2d(5, 1, 2), 16),
    "max pool, called": (lambda: lambda x: F.max_pool2d(x, 3, stride=2, padding=1), 16),
    "average pool, called": (lambda: lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), 16),
    "max pool, rounded up": (lambda: nn.MaxPool2d(3, 2, ceil_mode=True), 16),
    "max pool, rounded up, padding": (lambda: lambda x: F.max_pool2d(x, 2, 3, 1, ceil_mode=True), 16),
    "average pool, rounded up": (lambda: nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False), 16),
    "average pool, rounded up, padding": (lambda: nn.AvgPool2d(3, (2, 3), 1, ceil_mode=True), 16),
    "average pool, rounded up, called": (lambda: lambda x: F.avg_pool2d(x, 3, 3, 1, True, False), 16),
    "average of a window of the map's size": (lambda: lambda x: x * F.avg_pool2d(x, x.shape[2:]), 16),
    "calls": (lambda: Calls(16), 16),
    "split from the end": (lambda: split_from_the_end, 16),
    "zeros around": (lambda: nn.Sequential(nn.ZeroPad2d((1, 0, 2, 3)), nn.MaxPool2d(2, 1)), 16),
    "adaptive average": (lambda: nn.AdaptiveAvgPool2d((3, 2)), 16),
    "adaptive maximum": (lambda: nn.AdaptiveMaxPool2d(2), 16),
    "group norm": (lambda: norm(nn.GroupNorm(4, 16)), 16),
    "group norm and SiLU": (lambda: nn.Sequential(norm(nn.GroupNorm(2, 16)), nn.SiLU()), 16),
    "layer norm, linear": (lambda: ByPixel(16), 16),
    "softmax": (lambda: nn.Softmax(dim=1), 16),
    "softmax, called": (lambda: lambda x: x.softmax(1), 16),
    "ReLU6 as a clamp": (lambda: lambda x: x.clamp(0, 6), 16),
    "PReLU, called": (lambda: lambda x: F.prelu(x, torch.linspace(-1, 1, 16).to(x)), 16),
    "group norm, called": (lambda: lambda x: F.group_norm(x, 4, torch.linspace(0.5, 1, 16).to(x)), 16),
    "layer norm and linear, called": (lambda: CallsByPixel(16), 16),
    "squeezed and multiplied": (lambda: Vectors(16), 16),
    "transposed": (lambda: nn.ConvTranspose2d(16, 12, 2, 2), 12),
    "transposed, overlapping, norm and SiLU": (
        lambda: nn.Sequential(nn.ConvTranspose2d(16, 12, 4, 2, 1, bias=False), nn.BatchNorm2d(12), nn.SiLU()),
        12,
    ),
    "transposed, output padding": (lambda: nn.ConvTranspose2d(16, 12, 3, 2, 1, output_padding=1), 12),
    "transposed, larger stride than kernel": (lambda: nn.ConvTranspose2d(16, 4, (1, 2), 3, output_padding=(2, 1)), 4),
    "transposed, of stride 1, groups": (lambda: nn.ConvTranspose2d(16, 12, 3, padding=1, groups=4), 12),
    "transposed, one for each channel": (lambda: nn.ConvTranspose2d(16, 16, 4, 2, 1, groups=16, bias=False), 16),
    "norm and ReLU in front": (lambda: nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.BatchNorm2d(16), nn.ReLU()), 16),
    "norm and SiLU in front": (lambda: nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.BatchNorm2d(16), nn.SiLU()), 16),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_operation(isa, name):
    torch.manual_seed(4)
    function, channels = FUNCTIONS[name]
    for kernel in (1, 3):
        net = settle(Between(function(), after=channels, kernel=kernel))
        engine = gatedconv.Engine(net, torch.randn(1, 3, 8, 10))
        assert len(engine.plans) == 1 and "Nothing is left to PyTorch" in engine.describe()
        least = (
            4 if "rounded up" in name or name == "calls" else 2 if "to a size" in name or name == "pixel shuffle" else 1
        )
        sizes = ((8, 10), (9, 7), (11, 12), (least, least))
        for size in sizes:
            for batch in (1, 3):
                x = torch.randn(batch, 3, *size)
                assert error(engine(x), net, x) <= tolerance()
        empty = torch.empty(0, 3, 8, 10)
        assert engine(empty).shape == net(empty).shape


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [1, 24, 40])
def test_depthwise(isa, kernel, stride, channels):
    torch.manual_seed(kernel)
    layers = [nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels), nn.Hardswish()]
    net = settle(nn.Sequential(nn.Conv2d(2, channels, 1), *layers, nn.Conv2d(channels, 3, 1)))
    engine = gatedconv.Engine(net, torch.randn(1, 2, 14, 14))
    assert "Nothing is left to PyTorch" in engine.describe()
    for size in ((14, 14), (23, 17), (1, 1), (2, 9)):
        x = torch.randn(2, 2, *size)
        assert error(engine(x), net, x) <= tolerance()


OTHERS = {
    "dilated": {"kernel_size": 3, "dilation": 2},
    "of two strides": {"kernel_size": 2, "stride": (1, 2)},
    "no whole tiles": {"kernel_size": 3, "stride": 2, "padding": 1},
    "cropped": {"kernel_size": 1, "padding": 1},
    "as large as the map": {"kernel_size": 9, "stride": 1},
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_transposed_convolutions_that_stay_in_pytorch(options):
    net = Between(nn.ConvTranspose2d(16, 12, **options), after=12, kernel=3).eval()
    engine = gatedconv.Engine(net, torch.randn(1, 3, 8, 10))
    assert "In PyTorch: 1 operations" in engine.describe() and len(engine.plans) == 2
    for size in ((8, 10), (5, 7)):
        x = torch.randn(2, 3, *size)
        assert error(engine(x), net, x) <= tolerance()


def test_constants_of_transposed_convolutions_have_names_of_their_own():
    class Ups(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.up_1 = nn.ConvTranspose2d(3, 8, 2, 2), nn.ConvTranspose2d(8, 4, 2, 2)
            self.register_buffer("constant_tile_0", torch.full((1, 8, 1, 1), 2.0))

        def forward(self, x):
            return self.up_1(self.up(x) * self.constant_tile_0)

    net, x = Ups().eval(), torch.randn(2, 3, 6, 5)
    engine = gatedconv.Engine(net, x)
    assert len(engine.plans) == 1 and error(engine(x), net, x) <= tolerance()


def test_flattened_maps_and_linear_layers():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d((3, 2)),
        nn.Flatten(),
        nn.Linear(48, 20),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(20, 4),
    ).eval()
    engine = gatedconv.Engine(net, torch.randn(1, 3, 16, 16))
    assert "Nothing is left to PyTorch" in engine.describe()
    for size in ((16, 16), (21, 33)):
        x = torch.randn(3, 3, *size)
        assert error(engine(x), net, x) <= tolerance()


def test_a_slice_that_is_written_in_place_stays_in_pytorch():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 32, 1)

        def forward(self, x):
            y = self.conv(x)
            a, b = y.chunk(2, 1)
            a.relu_()
            return torch.cat([y, b], 1)

    net, x = Writes().eval(), torch.randn(2, 3, 4, 4)
    engine = gatedconv.Engine(net, x)
    assert engine.reason is None and error(engine(x), net, x) <= tolerance()


def test_parts_of_a_concatenation_are_not_copied():
    net = Between(dense, after=80)
    engine = gatedconv.Engine(net.eval(), torch.randn(1, 3, 8, 8))
    copies = [step for step in engine.plans[0].steps if step.op == "copy"]
    assert 0 < len(copies) <= 4  # x and relu(x) lie in two concatenations
