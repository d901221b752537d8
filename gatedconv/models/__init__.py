"""Networks for small images, gated or dense: the CIFAR ResNets 20 to 110, and a fast network of the VGG form."""

from collections.abc import Callable

from torch import nn

from gatedconv.models.cifar_vgg import CifarVGG, VGGGroup, cifar_vgg
from gatedconv.models.resnet import ResNet, resnet20, resnet32, resnet44, resnet56, resnet110

__all__ = ["CifarVGG", "ResNet", "VGGGroup", "cifar_vgg", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"]

# By the names that configs and saved files have. Not public.
BUILDERS: dict[str, Callable[..., nn.Module]] = {
    builder.__name__: builder for builder in (resnet20, resnet32, resnet44, resnet56, resnet110, cifar_vgg)
}
