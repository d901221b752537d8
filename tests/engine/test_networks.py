"""Networks that people ship run as one plan, exactly."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gatedconv
from benchmarks.yolo import Yolo
from tests.engine.nets import error, settle
from tests.tolerances import tolerance

torchvision = pytest.importorskip("torchvision")

LIMIT = tolerance()
NETWORKS = {
    "mobilenet_v2": 48,
    "mobilenet_v3_large": 48,
    "efficientnet_b0": 48,
    "efficientnet_v2_s": 48,
    "regnet_y_400mf": 48,
    "densenet121": 48,
    "convnext_tiny": 64,
    "shufflenet_v2_x1_0": 48,
    "resnet18": 48,
    "resnet50": 48,
    "resnext50_32x4d": 48,
    "vgg11_bn": 48,
}


def check(net, size, channels=3):
    x = torch.randn(1, channels, size, size)
    engine = gatedconv.Engine(net, x, verify=False)
    text = engine.describe()
    assert len(engine.plans) == 1 and "Nothing is left to PyTorch" in text
    other = torch.randn(3, channels, size + 19, size - 9)
    assert error(engine(other), net, other) <= LIMIT
    return text


# One of each kind: plain residuals, squeeze and excitation, shuffled channels, layer norms in channels_last.
QUICK = ("resnet18", "mobilenet_v3_large", "shufflenet_v2_x1_0", "convnext_tiny")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]
)
def test_torchvision(name):
    torch.manual_seed(6)
    check(settle(getattr(torchvision.models, name)(num_classes=10)), NETWORKS[name])


class Double(nn.Sequential):
    def __init__(self, inputs, outputs):
        layers = []
        for channels in (inputs, outputs):
            layers += [
                nn.Conv2d(channels, outputs, 3, 1, 1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers)


class UNet(nn.Module):
    """Three levels; the way up resizes to the size of the map it joins."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([Double(3, 16), Double(16, 32), Double(32, 48)])
        self.up = nn.ModuleList([Double(80, 32), Double(48, 16)])
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x):
        a = self.down[0](x)
        b = self.down[1](F.max_pool2d(a, 2))
        c = self.down[2](F.max_pool2d(b, 2))
        b = self.up[0](torch.cat([b, F.interpolate(c, size=b.shape[2:], mode="bilinear", align_corners=False)], 1))
        a = self.up[1](torch.cat([a, F.interpolate(b, size=a.shape[2:], mode="bilinear", align_corners=False)], 1))
        return F.softmax(self.head(a), dim=1)


class TransposedUNet(UNet):
    """The way up by transposed convolutions, padded to the size of the map that they join."""

    def __init__(self):
        super().__init__()
        self.wider = nn.ModuleList([nn.ConvTranspose2d(48, 48, 2, 2), nn.ConvTranspose2d(32, 32, 2, 2)])

    def forward(self, x):
        maps = [self.down[0](x)]
        for down in self.down[1:]:
            maps.append(down(F.max_pool2d(maps[-1], 2)))
        y = maps.pop()
        for wider, up in zip(self.wider, self.up, strict=True):
            other, y = maps.pop(), wider(y)
            rows, columns = (other.shape[d] - y.shape[d] for d in (2, 3))
            y = F.pad(y, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
            y = up(torch.cat([other, y], 1))
        return F.softmax(self.head(y), dim=1)


@pytest.mark.parametrize("kind", [UNet, TransposedUNet])
def test_a_unet(kind):
    text = check(settle(kind()), 32)
    assert "copy" not in text and "depthwise" not in text


@pytest.mark.parametrize("size", [64, 96])
def test_a_yolo_backbone_and_neck(size):
    net = settle(Yolo(width=8))
    x = torch.randn(2, 3, size, size)
    engine = gatedconv.Engine(net, torch.randn(1, 3, 64, 64))
    assert len(engine.plans) == 1 and "Nothing is left to PyTorch" in engine.describe()
    assert error(engine(x), net, x) <= LIMIT
