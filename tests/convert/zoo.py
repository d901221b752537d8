"""The networks that docs/models.md is about: a list of names, and a draw from all of timm's convolutional ones."""

from __future__ import annotations

import fnmatch
import random
from collections.abc import Iterable

import torch
from torch import Tensor, nn

TORCHVISION = (
    "resnet18",
    "resnet34",
    "resnet50",
    "wide_resnet50_2",
    "resnext50_32x4d",
    "vgg16_bn",
    "densenet121",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "regnet_y_400mf",
    "convnext_tiny",
    "googlenet",
    "shufflenet_v2_x1_0",
    "mnasnet1_0",
)
TIMM = (
    "resnet26d",
    "seresnet50",
    "efficientnet_lite0",
    "ghostnet_100",
    "repvgg_a0",
    "cspresnet50",
    "resnetv2_50",
)
NAMED = (*(f"torchvision/{n}" for n in TORCHVISION), *(f"timm/{n}" for n in TIMM))
# The modules of timm.models that hold convolutional networks; those with attention between pixels are left out.
FAMILIES = (
    "byobnet",
    "convmixer",
    "convnext",
    "cspnet",
    "cspnext",
    "densenet",
    "dla",
    "dpn",
    "efficientnet",
    "fasternet",
    "focalnet",
    "ghostnet",
    "hardcorenas",
    "hgnet",
    "hrnet",
    "inception_next",
    "inception_resnet_v2",
    "inception_v3",
    "inception_v4",
    "lcnetv2",
    "mambaout",
    "metaformer",
    "mobilenetv3",
    "nasnet",
    "nfnet",
    "pnasnet",
    "rdnet",
    "regnet",
    "repghost",
    "repvit",
    "res2net",
    "resnest",
    "resnet",
    "resnetv2",
    "rexnet",
    "selecsls",
    "senet",
    "sknet",
    "starnet",
    "tresnet",
    "vgg",
    "vovnet",
    "xception",
    "xception_aligned",
)
# Members of those modules that attend between pixels after all, and miniatures made for timm's own tests.
NOT_CNN = ("*clip*", "*siglip*", "*hybrid*", "caformer*", "*lambda*", "test_*")
LARGEST = 60_000_000  # parameters of a network drawn at random: a question of time alone


def build(name: str) -> tuple[nn.Module, Tensor]:
    """The network with random weights, in eval mode, and two images of the smallest size that it takes."""
    torch.manual_seed(0)
    library, _, short = name.rpartition("/")
    if library == "torchvision":
        import torchvision

        options = {"init_weights": False} if short in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(short, weights=None, **options).eval()
        sizes: Iterable[int] = (64, 224)
    else:
        import timm

        model = timm.create_model(short, pretrained=False).eval()
        sizes = (64, 128, model.default_cfg["input_size"][-1])
    for size in sizes:
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(5))
        try:
            with torch.no_grad():
                model(images)
            return model, images
        except (RuntimeError, AssertionError, ValueError):
            continue
    raise RuntimeError(f"{name} takes no image of the sizes {tuple(sizes)}")


def randomize(model: nn.Module, images: Tensor) -> None:
    """Norm weights and layer scales at random, then the norms' statistics from data.

    A network fresh from its constructor hardly reacts to its branches, and an error would hide.
    """
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if "norm" in type(module).__name__.lower() and isinstance(getattr(module, "weight", None), nn.Parameter):
            module.weight.data.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
            if isinstance(getattr(module, "bias", None), nn.Parameter):
                module.bias.data.copy_(torch.rand(module.bias.shape, generator=generator) - 0.5)
    for name, parameter in model.named_parameters():
        if "gamma" in name or "layer_scale" in name or "skipinit" in name:
            parameter.data.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        model(torch.randn(8, *images.shape[1:], generator=generator))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def drawn(count: int, seed: int) -> list[str]:
    """Timm's convolutional networks of moderate size at random: each family in turn gives one, until enough."""
    import timm

    families: dict[str, list[str]] = {family: [] for family in FAMILIES}
    for name in timm.list_models():
        family = timm.model_entrypoint(name).__module__.rpartition(".")[2]
        if family in families and not any(fnmatch.fnmatch(name, pattern) for pattern in NOT_CNN):
            families[family].append(name)
    generator = random.Random(seed)
    for names in families.values():
        generator.shuffle(names)
    order = generator.sample(FAMILIES, len(FAMILIES))
    chosen: list[str] = []
    while len(chosen) < count and any(families.values()):
        for family in order:
            while families[family]:
                name = families[family].pop()
                if _parameters(name) <= LARGEST:
                    chosen.append(f"timm/{name}")
                    break
    return chosen[:count]


def _parameters(name: str) -> int:
    import timm

    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name).parameters())
