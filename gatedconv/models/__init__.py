"""Networks for small images, gated or dense: the CIFAR ResNets 20 to 110."""

from gatedconv.models.resnet import ResNet, resnet20, resnet32, resnet44, resnet56, resnet110

RESNETS = {builder.__name__: builder for builder in (resnet20, resnet32, resnet44, resnet56, resnet110)}
BUILDERS = {**RESNETS}

__all__ = ["BUILDERS", "RESNETS", "ResNet", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"]
