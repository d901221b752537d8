"""Images in memory as uint8, from five kinds of source, and batches of them made on the device."""

from __future__ import annotations

from gatedconv.data.batches import EvalBatches, TrainBatches
from gatedconv.data.image_data import Augment, ImageData, validation_view
from gatedconv.data.image_files import DataError
from gatedconv.data.sources import load_data

__all__ = ["Augment", "DataError", "EvalBatches", "ImageData", "TrainBatches", "load_data", "validation_view"]
