"""Networks that people ship run as one plan, exactly."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gatedconv
from tests.engine.nets import error, settle

torchvision = pytest.importorskip("torchvision")

LIMIT = 1e-5
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


@pytest.mark.parametrize("name", NETWORKS)
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


def test_a_unet():
    text = check(settle(UNet()), 32)
    assert "copy" not in text


class Conv(nn.Sequential):
    def __init__(self, inputs, outputs, kernel=1, stride=1):
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), nn.SiLU(inplace=True))


class C2f(nn.Module):
    """YOLOv8's block: half of the channels through bottlenecks, every result in the concatenation."""

    def __init__(self, inputs, outputs, depth, shortcut):
        super().__init__()
        half = outputs // 2
        self.first, self.last = Conv(inputs, outputs), Conv((2 + depth) * half, outputs)
        self.blocks = nn.ModuleList(nn.Sequential(Conv(half, half, 3), Conv(half, half, 3)) for _ in range(depth))
        self.shortcut = shortcut

    def forward(self, x):
        parts = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]) if self.shortcut else block(parts[-1]))
        return self.last(torch.cat(parts, 1))


class Yolo(nn.Module):
    """YOLOv8n's backbone and neck at half its width, the three maps for the head joined as one."""

    def __init__(self, w=8):
        super().__init__()
        self.stem = nn.Sequential(Conv(3, w, 3, 2), Conv(w, 2 * w, 3, 2), C2f(2 * w, 2 * w, 1, True))
        self.p3 = nn.Sequential(Conv(2 * w, 4 * w, 3, 2), C2f(4 * w, 4 * w, 2, True))
        self.p4 = nn.Sequential(Conv(4 * w, 8 * w, 3, 2), C2f(8 * w, 8 * w, 2, True))
        self.p5 = nn.Sequential(Conv(8 * w, 16 * w, 3, 2), C2f(16 * w, 16 * w, 1, True))
        self.squeeze, self.spread = Conv(16 * w, 8 * w), Conv(32 * w, 16 * w)
        self.up4, self.up3 = C2f(24 * w, 8 * w, 1, False), C2f(12 * w, 4 * w, 1, False)
        self.to4, self.down4 = Conv(4 * w, 4 * w, 3, 2), C2f(12 * w, 8 * w, 1, False)
        self.pool, self.up = nn.MaxPool2d(5, 1, 2), nn.Upsample(scale_factor=2, mode="nearest")

    def forward(self, x):
        p3 = self.p3(self.stem(x))
        p4 = self.p4(p3)
        parts = [self.squeeze(self.p5(p4))]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        p5 = self.spread(torch.cat(parts, 1))
        n4 = self.up4(torch.cat([self.up(p5), p4], 1))
        n3 = self.up3(torch.cat([self.up(n4), p3], 1))
        return self.down4(torch.cat([self.to4(n3), n4], 1))


@pytest.mark.parametrize("size", [64, 96])
def test_a_yolo_backbone_and_neck(size):
    net = settle(Yolo())
    x = torch.randn(2, 3, size, size)
    engine = gatedconv.Engine(net, torch.randn(1, 3, 64, 64))
    assert len(engine.plans) == 1 and "Nothing is left to PyTorch" in engine.describe()
    assert error(engine(x), net, x) <= LIMIT
