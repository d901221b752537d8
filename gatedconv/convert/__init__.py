"""Gates for any convolutional network."""

from gatedconv.convert.conversion import Conversion
from gatedconv.convert.gate_model import gate_model
from gatedconv.convert.verify import ConversionError, require_same

__all__ = ["Conversion", "ConversionError", "gate_model", "require_same"]
