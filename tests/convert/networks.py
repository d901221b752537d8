"""Small networks with one difficulty each, and an oracle for their masks that uses only forward hooks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm


class Block(nn.Module):
    """A bottleneck with squeeze-excite, grouped or depthwise inside, and a projection where asked."""

    def __init__(self, channels, out, groups=1, stride=1, act=nn.ReLU, dilation=1):
        super().__init__()
        hidden = 2 * channels
        self.conv1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, dilation, dilation, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.squeeze = nn.Conv2d(hidden, 4, 1)
        self.excite = nn.Conv2d(4, hidden, 1)
        self.conv3 = nn.Conv2d(hidden, out, 1)
        self.bn3 = nn.BatchNorm2d(out)
        self.act = act()
        self.project = None
        if stride > 1 or channels != out:
            self.project = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.open = 1.0  # the oracle's layer gate

    def forward(self, x):
        h = self.act(self.bn1(self.conv1(x)))
        h = self.act(self.bn2(self.conv2(h)))
        h = h * torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(h, 1)))))
        h = self.bn3(self.conv3(h))
        shortcut = x if self.project is None else self.project(x)
        return self.act(shortcut + h * self.open)


class Residual(nn.Module):
    """Three blocks."""

    def __init__(self, **options):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block(8, 8, **options), Block(8, 12, stride=2, **options), Block(12, 12, **options))
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        return self.fc(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


class Plain(nn.Module):
    """Convolutions in a row, a flattened classifier, and an activation that turns zero into something else."""

    def __init__(self, act=nn.Sigmoid, padding_mode="zeros"):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, padding_mode=padding_mode)
        self.bn1 = nn.BatchNorm2d(8)
        self.act = act()
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1, bias=False, padding_mode=padding_mode)
        self.bn2 = nn.BatchNorm2d(12)
        self.conv3 = nn.Conv2d(12, 6, 3, stride=2)
        self.fc = nn.Linear(6 * 25, 5)

    def forward(self, x):
        x = self.act(self.bn1(self.conv1(x)))
        x = F.max_pool2d(self.act(self.bn2(self.conv2(x))), 2) if x.dim() == 3 else self.act(self.bn2(self.conv2(x)))
        return self.fc(self.act(self.conv3(x)).flatten(1))


class Shuffled(nn.Module):
    """Concatenation, chunks, a channel shuffle and a pixel shuffle."""

    def __init__(self):
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.right = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.mix = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.head = nn.Conv2d(12, 8, 3)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.cat([self.left(x), self.right(x)], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        a, b = x.chunk(2, 1)
        b = F.pixel_shuffle(self.mix(b), 2)
        x = torch.cat([a, F.avg_pool2d(b, 2)], 1)
        return self.fc(F.relu(self.head(x)).mean((2, 3)))


class ChannelsLast(nn.Module):
    """A ConvNeXt block: depthwise, LayerNorm, dense layers on channels that come last, a layer scale."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 5, padding=2, groups=8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 20)
        self.down = nn.Linear(20, 8)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8).reshape(8, 1, 1))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        h = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        h = self.down(F.gelu(self.up(h))).permute(0, 3, 1, 2) * self.scale
        return self.fc((x + h).mean((2, 3)))


class Attention(nn.Module):
    """Self-attention over pixels, its heads in the batch's dimension, with sizes asked of merged tensors."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.qkv = nn.Conv2d(8, 24, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        x = self.stem(x)
        b, c, h, w = x.shape
        q, k, v = self.qkv(x).chunk(3, 1)
        q = q.reshape(b * 2, c // 2, -1).transpose(1, 2)
        k = k.reshape(b * 2, c // 2, -1)
        v = v.reshape(b * 2, c // 2, -1).transpose(1, 2)
        rows, pixels, _ = q.shape
        scores = (q @ k).reshape(rows, pixels, pixels).softmax(-1)
        x = self.norm((scores @ v).transpose(1, 2).reshape(b, c, h, w)) + x
        return self.fc(F.relu(self.head(x)).mean((2, 3)))


class Computed(nn.Module):
    """Weights computed in each forward, channels in another order, layers called by keyword."""

    def __init__(self):
        super().__init__()
        self.conv1 = weight_norm(nn.Conv2d(3, 8, 3, padding=1))
        self.conv2 = spectral_norm(nn.Conv2d(8, 12, 3, padding=1, bias=False))
        self.bn2 = nn.BatchNorm2d(12)
        self.conv3 = nn.Conv2d(12, 6, 3, padding="same")
        self.fc = nn.Linear(6, 5)
        self.register_buffer("order", torch.randperm(8))

    def forward(self, x):
        x = F.relu(self.conv1(x))[:, self.order]
        x = F.relu(input=self.bn2(self.conv2(input=x)))
        return self.fc(F.relu(self.conv3(x)).mean(dim=(-2, -1)))


class UNet(nn.Module):
    """An encoder and a decoder: a transposed convolution, an interpolation, concatenated skips, instance norm."""

    def __init__(self):
        super().__init__()
        self.down1 = nn.Conv2d(3, 8, 3, padding=1)
        self.down2 = nn.Conv2d(8, 12, 3, padding=1)
        self.norm2 = nn.InstanceNorm2d(12, affine=True)
        self.bottom = nn.Conv2d(12, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(12, 4, 2, 2)
        self.join = nn.Conv2d(20, 6, 3, padding=1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        a = F.relu(self.down1(x))
        b = F.relu(self.norm2(self.down2(F.max_pool2d(a, 2))))
        c = F.interpolate(F.relu(self.bottom(F.avg_pool2d(b, 2))), size=a.shape[-2:], mode="nearest")
        return self.fc(F.relu(self.join(torch.cat([a, self.up(b), c], 1))).amax((2, 3)))


class Decoder(nn.Module):
    """Transposed convolutions: with a norm, with one for each channel, with an output size, in a residual sum."""

    def __init__(self):
        super().__init__()
        self.down1 = nn.Conv2d(3, 8, 3, padding=1)
        self.down2 = nn.Conv2d(8, 10, 3, 2, padding=1)
        self.norm2 = nn.BatchNorm2d(10)
        self.up1 = nn.ConvTranspose2d(10, 9, 4, 2, padding=1, bias=False)
        self.upnorm1 = nn.BatchNorm2d(9)
        self.wide = nn.Conv2d(10, 9, 1)
        self.bilinear = nn.ConvTranspose2d(9, 9, 4, 2, padding=1, groups=9, bias=False)
        self.up2 = nn.ConvTranspose2d(18, 8, 3, 2, dilation=2)
        self.head = nn.ConvTranspose2d(8, 6, 1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        a = F.relu(self.down1(x))
        b = F.silu(self.norm2(self.down2(a)))
        c = torch.cat([torch.sigmoid(self.upnorm1(self.up1(b))), self.bilinear(self.wide(b))], 1)
        size = [2 * d + 3 for d in c.shape[-2:]]
        d = self.up2(c, output_size=size)[..., 3::2, 3::2] + a
        return self.fc(F.relu(self.head(d)).amax((2, 3)))


class GroupNorms(nn.Module):
    """Group norms: behind a convolution, an activation, a transposed and a depthwise one, and of a residual branch."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.norm1 = nn.GroupNorm(4, 12)
        self.deep = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.norm2 = nn.GroupNorm(2, 12, affine=False)
        self.deep2 = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.norm2b = nn.GroupNorm(4, 12)
        self.mid = nn.Conv2d(12, 12, 1)
        self.conv3 = nn.Conv2d(12, 16, 3, padding=1)
        self.norm3 = nn.GroupNorm(8, 16)
        self.conv4 = nn.Conv2d(16, 12, 3, padding=1)
        self.norm4 = nn.GroupNorm(3, 12)
        self.up = nn.ConvTranspose2d(12, 8, 2, 2)
        self.norm5 = nn.GroupNorm(4, 8)
        self.last = nn.Conv2d(8, 6, 1)
        self.norm6 = nn.GroupNorm(1, 6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        x = torch.sigmoid(self.norm2(self.deep(F.relu(self.norm1(self.conv1(x))))))
        x = F.relu(self.mid(F.relu(self.norm2b(self.deep2(x)))))
        x = x + self.norm4(self.conv4(F.silu(self.norm3(F.leaky_relu(self.conv3(x))))))
        x = F.relu(self.norm5(self.up(x)))
        return self.fc(self.norm6(self.last(x)).amax((2, 3)))


NETWORKS = {
    "residual": lambda: Residual(),
    "grouped": lambda: Residual(groups=4),
    "depthwise_dilated": lambda: Residual(groups=8, dilation=2),
    "hardswish": lambda: Residual(act=nn.Hardswish),
    "sigmoid": lambda: Plain(),
    "reflect": lambda: Plain(padding_mode="reflect"),
    "relu": lambda: Plain(act=nn.ReLU),
    "shuffled": lambda: Shuffled(),
    "channels_last": lambda: ChannelsLast(),
    "attention": lambda: Attention(),
    "computed": lambda: Computed(),
    "unet": lambda: UNet(),
    "decoder": lambda: Decoder(),
    "group_norms": lambda: GroupNorms(),
}
IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def network(name: str) -> nn.Module:
    """A network of the list, as after training, in eval mode."""
    torch.manual_seed(0)
    model = NETWORKS[name]()
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if (
            isinstance(module, (nn.BatchNorm2d, nn.LayerNorm, nn.InstanceNorm2d, nn.GroupNorm))
            and module.weight is not None
        ):
            module.weight.data.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
            module.bias.data.copy_(torch.rand(module.bias.shape, generator=generator) - 0.5)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(torch.randn(16, 3, 12, 12, generator=generator))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return model.eval()


@torch.no_grad()
def masked_forward(model: nn.Module, images: Tensor, masks: Mapping[str, Tensor], follow: Mapping[str, str]) -> Tensor:
    """The dense model with layer outputs multiplied by masks.

    Args:
        model: a network of this file.
        images: its input.
        masks: gate path -> bool mask; "path.channel_gate" multiplies the output of the module at "path".
        follow: further modules -> the gate whose mask they get too.
    """
    hooks = []

    def multiply(path: str, mask: Tensor) -> None:
        def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
            last = isinstance(module, (nn.Linear, nn.LayerNorm))
            size = output.shape[-1 if last else 1]
            each = torch.stack([mask] * (size // len(mask)), dim=1).flatten().to(output)  # a group norm's by group
            return output * (each if last else each[:, None, None])

        hooks.append(model.get_submodule(path).register_forward_hook(hook))

    for gate, mask in masks.items():
        if gate.endswith("layer_gate"):
            model.get_submodule(gate.removesuffix(".layer_gate")).open = float(mask)
        else:
            multiply(gate.removesuffix(".channel_gate"), mask)
    for path, gate in follow.items():
        multiply(path, masks[gate])
    result: Tensor = model(images)
    for hook in hooks:
        hook.remove()
    for module in model.modules():
        if isinstance(module, Block):
            module.open = 1.0
    return result
