"""Networks for small images, gated or dense: the CIFAR ResNets 20 to 110, and a fast network of the VGG form."""

from gatedconv.models.cifar_vgg import CifarVGG, VGGGroup, cifar_vgg
from gatedconv.models.resnet import ResNet, resnet20, resnet32, resnet44, resnet56, resnet110

BUILDERS = {builder.__name__: builder for builder in (resnet20, resnet32, resnet44, resnet56, resnet110)}
NETWORKS = (*BUILDERS, "cifar_vgg")

__all__ = [
    "BUILDERS",
    "NETWORKS",
    "CifarVGG",
    "ResNet",
    "VGGGroup",
    "cifar_vgg",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
]
