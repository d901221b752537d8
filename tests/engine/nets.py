"""Small networks for the engine's tests, and the yardstick of the exactness contract."""

import copy

import torch
from torch import nn

from tests.tolerances import relative_error

ISAS = ("portable", "avx2", "avx512")


def supported(isa: str) -> bool:
    """Whether this machine runs an instruction set."""
    capability = torch.backends.cpu.get_cpu_capability()
    return isa == "portable" or (isa == "avx2" and capability != "DEFAULT") or capability == "AVX512"


def settle(model: nn.Module) -> nn.Module:
    """Give norms the statistics and weights that a trained network has, and put the model in eval."""
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.5, 1.0, generator=generator)
                nn.init.normal_(module.bias, 0.0, 0.1, generator=generator)
    return model.eval()


@torch.no_grad()
def error(result: torch.Tensor, model: nn.Module, x: torch.Tensor) -> float:
    """max|a - b| / max|b| against the model in float64."""
    exact = copy.deepcopy(model).double()(x.double())
    return relative_error(result, exact)


class Residual(nn.Module):
    """x -> relu(f(x) + shortcut(x)), written with an in-place addition as torchvision does."""

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, channels, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Conv2d(channels, channels, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return self.relu(out)
