"""The networks that docs/models.md is about: a list of names, and a draw from all of timm's convolutional ones."""

from __future__ import annotations

import fnmatch
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

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
TIMM = ("resnet26d", "seresnet50", "efficientnet_lite0", "ghostnet_100", "repvgg_a0", "cspresnet50", "resnetv2_50")
NAMED = (*(f"torchvision/{n}" for n in TORCHVISION), *(f"timm/{n}" for n in TIMM))
# Networks of other tasks, as people bring them.
TASKS = (
    *(
        f"torchvision/{n}"
        for n in (
            "lraspp_mobilenet_v3_large",
            "ssdlite320_mobilenet_v3_large",
            "fcn_resnet50",
            "deeplabv3_resnet50",
            "retinanet_resnet50_fpn",
            "fcos_resnet50_fpn",
            "fasterrcnn_resnet50_fpn",
            "keypointrcnn_resnet50_fpn",
        )
    ),
    "ultralytics/yolov8n",
    *(f"smp/{n}" for n in ("Unet", "FPN", "DeepLabV3Plus", "PSPNet")),
    "timm/mobileone_s0",
)
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


@dataclass
class Subject:
    """A network with random weights, in eval mode.

    Attributes:
        example: images (2, 3, H, W), or a tuple of arguments.
        training: arguments of a forward in training.
        others: examples of two other sizes.
    """

    model: nn.Module
    example: Any
    training: tuple[Any, ...]
    others: tuple[Any, ...]

    @property
    def size(self) -> int:
        """The width of its images."""
        return int(next(t for t in tree_flatten(self.example)[0] if isinstance(t, Tensor)).shape[-1])


def build(name: str) -> Subject:
    """The network, and two images of the smallest size that it takes."""
    torch.manual_seed(0)
    library, _, short = name.rpartition("/")
    if library == "torchvision":
        return _torchvision(short)
    if library == "smp":
        import segmentation_models_pytorch

        options = {"encoder_name": "resnet18", "encoder_weights": None, "classes": 3}
        return _classifier(name, getattr(segmentation_models_pytorch, short)(**options).eval(), (64, 128))
    if library == "ultralytics":
        from ultralytics.nn.tasks import DetectionModel

        return _classifier(name, DetectionModel(f"{short}.yaml", verbose=False).eval(), (64,))
    import timm

    model = timm.create_model(short, pretrained=False).eval()
    return _classifier(name, model, (64, 128, model.default_cfg["input_size"][-1]))


def _torchvision(short: str) -> Subject:
    import torchvision

    kind = torchvision.models.get_model_builder(short).__module__.split(".")[2]
    options = {"init_weights": False} if short in ("googlenet", "inception_v3") else {}
    if kind in ("detection", "segmentation"):
        options["weights_backbone"] = None
    if kind == "detection" and "ssd" not in short:
        options |= {"min_size": 128, "max_size": 192}
    if kind == "detection" and "rcnn" not in short:
        options["score_thresh"] = 0.0
    if "rcnn" in short:
        options["box_detections_per_img"] = 10  # random weights find the most, each with its keypoints or mask
    model = torchvision.models.get_model(short, weights=None, **options).eval()
    if kind == "detection":
        return _detector(model, short)
    if kind == "optical_flow":
        pairs = [(_images(s, s), _images(s, s).flip(0)) for s in (128, 160, 192)]
        return Subject(model, pairs[0], pairs[0], tuple(pairs[1:]))
    if kind == "video":
        clips = [_images(s, s)[:, :, None].repeat(1, 1, 16, 1, 1) for s in (112, 128, 224)]
        fits = [clip for clip in clips if _runs(model, clip)]
        return Subject(model, fits[0], (fits[0],), tuple(fits[1:]))
    return _classifier(short, model, (64, 224))


def _classifier(name: str, model: nn.Module, sizes: Iterable[int]) -> Subject:
    for size in sizes:
        if _runs(model, _images(size, size)):
            batch = torch.cat([_images(size, size), _images(size, size).flip(-1) * 0.5])
            return Subject(model, _images(size, size), (batch,), (_images(size + 32, size), _images(size, size + 64)))
    raise RuntimeError(f"{name} takes no image of the sizes {tuple(sizes)}")


def _detector(model: nn.Module, short: str) -> Subject:
    box, points = torch.tensor([[8.0, 8.0, 90.0, 100.0]]), torch.tensor([[[40.0, 50.0, 1.0]] * 17])
    target = {"boxes": box, "labels": torch.tensor([1]), "keypoints": points}
    examples = []
    for height, width in ((128, 128), (128, 160), (160, 128)):
        examples.append(([*_images(height, width)],))
    if "rcnn" not in short:  # their heads hardly react, and find nothing
        for layer in model.head.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_uniform_(layer.weight, a=5**0.5)
    masks = torch.zeros(1, 128, 128, dtype=torch.uint8)
    masks[:, 8:90, 8:90] = 1
    targets = [{**target, "masks": masks} for _ in range(2)]
    return Subject(model, examples[0], (examples[0][0], targets), tuple(examples[1:]))


def _images(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(5))


def _runs(model: nn.Module, images: Tensor) -> bool:
    try:
        with torch.no_grad():
            model(images)
        return True
    except (RuntimeError, AssertionError, ValueError):
        return False


def randomize(model: nn.Module, example: Any) -> None:
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
        if isinstance(example, Tensor):
            example = torch.randn(8 if example.dim() == 4 else 2, *example.shape[1:], generator=generator)
        model(*example if isinstance(example, tuple) else (example,))
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
                if _parameters(f"timm/{name}") <= LARGEST:
                    chosen.append(f"timm/{name}")
                    break
    return chosen[:count]


def fresh(count: int, seed: int) -> list[str]:
    """Networks of moderate size of every task and kind: two fifths from torchvision, the others from timm."""
    import timm
    import torchvision

    pools = {"torchvision": torchvision.models.list_models(), "timm": timm.list_models(exclude_filters="test_*")}
    generator = random.Random(seed)
    chosen: list[str] = []
    for library, wanted in (("torchvision", count * 2 // 5), ("timm", count - count * 2 // 5)):
        names = [f"{library}/{name}" for name in pools[library]]
        generator.shuffle(names)
        small = (name for name in names if _parameters(name) <= LARGEST)
        chosen += [name for name, _ in zip(small, range(wanted), strict=False)]
    generator.shuffle(chosen)
    return chosen


def _parameters(name: str) -> int:
    library, _, short = name.rpartition("/")
    if library == "torchvision":
        import torchvision

        return int(next(iter(torchvision.models.get_model_weights(short))).meta["num_params"])
    import timm

    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(short).parameters())
