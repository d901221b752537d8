"""Networks from public bug reports: gated, trained, compact, in a file, copied; the model itself is the oracle."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import gatedconv
from tests.tolerances import assert_close

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CLIPS = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def block(i, o, stride=1, norm=nn.BatchNorm2d):
    return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), norm(o), nn.ReLU())


class WeightedPyramid(nn.Module):
    """BiFPN: features are added with learned weights, up and down."""

    def __init__(self):
        super().__init__()
        self.c1, self.c2, self.c3 = block(3, 16, 2), block(16, 16, 2), block(16, 16, 2)
        self.mix = nn.ModuleList([block(16, 16) for _ in range(4)])
        self.w, self.head = nn.Parameter(torch.rand(3, 2)), nn.Conv2d(16, 6, 1)

    def forward(self, x):
        p1 = self.c1(x)
        p2 = self.c2(p1)
        p3 = self.c3(p2)
        w = F.relu(self.w)
        w = w / (w.sum(1, keepdim=True) + 1e-4)
        t2 = self.mix[0](w[0, 0] * p2 + w[0, 1] * F.interpolate(p3, scale_factor=2))
        t1 = self.mix[1](w[1, 0] * p1 + w[1, 1] * F.interpolate(t2, scale_factor=2))
        o2 = self.mix[2](w[2, 0] * t2 + w[2, 1] * F.max_pool2d(t1, 2))
        return [self.head(t) for t in (t1, o2, self.mix[3](p3 + F.max_pool2d(o2, 2)))]


class Fourier(nn.Module):
    """A convolution on frequencies."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.fc = block(3, 16), block(32, 32), block(16, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.a(x)
        f = torch.fft.rfft2(x, norm="ortho")
        re, im = self.b(torch.cat([f.real, f.imag], 1)).chunk(2, 1)
        y = torch.fft.irfft2(torch.complex(re, im), s=x.shape[-2:], norm="ortho")
        return self.fc(self.c(x + y).mean((2, 3)))


class TemporalShift(nn.Module):
    """Channels move between the frames that the batch holds."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = block(3, 16), block(16, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.a(x)
        n, c, h, w = x.shape
        frames = x.view(n // 4, 4, c, h, w)
        out = torch.zeros_like(frames)
        out[:, :-1, :2], out[:, 1:, 2:4], out[:, :, 4:] = frames[:, 1:, :2], frames[:, :-1, 2:4], frames[:, :, 4:]
        x = x + self.b(out.view(n, c, h, w))
        return self.fc(x.mean((2, 3))).view(-1, 4, 5).mean(1)


class SuperResolution(nn.Module):
    """Scaled residual blocks and a pixel shuffle."""

    def __init__(self):
        super().__init__()
        self.head, self.tail = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(16, 3, 3, 1, 1)
        self.body = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1), nn.PReLU(16), nn.Conv2d(16, 16, 3, 1, 1)) for _ in range(2)
        )
        self.up = nn.Sequential(nn.Conv2d(16, 64, 3, 1, 1), nn.PixelShuffle(2), nn.PReLU())

    def forward(self, x):
        first = y = self.head(x)
        for part in self.body:
            y = y + part(y) * 0.1
        return self.tail(self.up(y + first))


class Reparametrized(nn.Module):
    """RepVGG before its branches become one: a norm alone is one of them."""

    class Block(nn.Module):
        """Three branches."""

        def __init__(self, i, o):
            super().__init__()
            self.r3 = nn.Sequential(nn.Conv2d(i, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o))
            self.r1 = nn.Sequential(nn.Conv2d(i, o, 1, bias=False), nn.BatchNorm2d(o))
            self.identity = nn.BatchNorm2d(i) if i == o else None

        def forward(self, x):
            y = self.r3(x) + self.r1(x)
            return F.relu(y if self.identity is None else y + self.identity(x))

    def __init__(self):
        super().__init__()
        self.blocks, self.fc = (
            nn.Sequential(self.Block(3, 16), self.Block(16, 16), self.Block(16, 16)),
            nn.Linear(16, 5),
        )

    def forward(self, x):
        return self.fc(self.blocks(x).mean((2, 3)))


class FilterResponseNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.gamma, self.beta = (
            nn.Parameter(torch.ones(1, channels, 1, 1)),
            nn.Parameter(torch.full((1, channels, 1, 1), 0.1)),
        )

    def forward(self, x):
        return torch.relu(self.gamma * x * torch.rsqrt(x.pow(2).mean((2, 3), keepdim=True) + 1e-6) + self.beta)


class Kernel(nn.Module):
    """A fixed kernel in a buffer, maxima of pairs of channels, coordinates as channels, a checkpoint."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        taps = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("kernel", (taps[:, None] * taps / 16).expand(16, 1, 3, 3).clone())
        self.a, self.b, self.c, self.fc = block(5, 16, 1, norm), block(8, 16, 1, norm), block(16, 16), nn.Linear(16, 5)

    def forward(self, x):
        n, _, h, w = x.shape
        rows = torch.linspace(-1, 1, h, dtype=x.dtype).view(1, 1, h, 1).expand(n, 1, h, w)
        columns = torch.linspace(-1, 1, w, dtype=x.dtype).view(1, 1, 1, w).expand(n, 1, h, w)
        x = self.a(torch.cat([x, rows, columns], 1))
        x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.kernel, groups=x.shape[1], stride=2)
        x = self.b(torch.max(x[:, ::2], x[:, 1::2]))
        x = checkpoint(self.c, x, use_reentrant=False) if self.training else self.c(x)
        return self.fc(x.mean((2, 3)))


NORMS = {
    "momentum none": lambda c: nn.BatchNorm2d(c, momentum=None),
    "untracked": lambda c: nn.BatchNorm2d(c, track_running_stats=False),
    "tracked instances": lambda c: nn.InstanceNorm2d(c, track_running_stats=True),
    "filter response": FilterResponseNorm,
}
KINDS = {
    **{k.__name__: (k, IMAGES) for k in (WeightedPyramid, Fourier, SuperResolution, Reparametrized, Kernel)},
    "TemporalShift": (TemporalShift, CLIPS),
    **{name: (lambda norm=norm: Kernel(norm), IMAGES) for name, norm in NORMS.items()},
}


def require_close(found, expected):
    assert tree_leaves(expected)
    assert_close(tree_leaves(found), tree_leaves(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_computes_what_the_model_does(kind, tmp_path):
    make, x = KINDS[kind]
    torch.manual_seed(0)
    model = make()
    for _ in range(3):
        model(x)
    model.eval()
    with torch.no_grad():
        dense = model(x)
    gated = gatedconv.gate_model(model, "both", example_input=x)
    with torch.no_grad():
        require_close(gated(x), dense)
    trained = copy.deepcopy(gated).train()
    loss = sum(t.square().mean() for t in tree_leaves(trained(x)) if isinstance(t, Tensor))
    (loss + gatedconv.polarization_loss(trained) + gatedconv.mac_target_loss(trained)).backward()
    assert all(gate.fc2.bias.grad is not None for gate in gatedconv.gates(trained).values())
    for pattern in (lambda n: torch.arange(n) % 2 == 1, lambda n: torch.zeros(n, dtype=torch.bool)):
        masks = {name: pattern(gate.num_gates) for name, gate in gatedconv.gates(gated).items()}
        frozen = gatedconv.freeze(gated, masks=masks)
        small = gatedconv.compact(frozen, x)
        assert type(small) is type(model)
        gatedconv.save(small, tmp_path / "small")
        loaded = gatedconv.load(tmp_path / "small", into=make()).eval()
        with torch.no_grad():
            expected = frozen(x)
            for found in (small, copy.deepcopy(small), loaded, gatedconv.Engine(small, x)):
                require_close(found(x), expected)
