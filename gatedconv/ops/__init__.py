"""Stateless operators, each with its plain PyTorch reference: ``<name>_reference``, same signature."""

from gatedconv.ops.masked_conv2d import masked_conv2d, masked_conv2d_reference
from gatedconv.ops.ste import ste, ste_reference

__all__ = ["masked_conv2d", "masked_conv2d_reference", "ste", "ste_reference"]
