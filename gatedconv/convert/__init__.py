"""Gates for any convolutional network."""

from gatedconv.convert.conversion import Conversion
from gatedconv.convert.gate_model import gate_model

__all__ = ["Conversion", "gate_model"]
