"""Networks in int8: ONNX Runtime's and OpenVINO's own tools, which calibrate on some images after training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CALIBRATION = 64  # images; both tools recommend some hundreds, but more random ones would add nothing


def calibration_images(x: Tensor) -> list[np.ndarray]:
    """Random images (1, C, H, W) for calibration, none of which is measured on."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randn((1, *x.shape[1:]), generator=generator).numpy() for _ in range(CALIBRATION)]


def onnxruntime_int8(source: Path, target: Path, images: Sequence[np.ndarray]) -> None:
    """Quantize an ONNX file: QDQ, static, weights per channel, by the tool in ONNX Runtime's wheel.

    Args:
        source: float32.
        target: the file to write.
        images: (1, C, H, W) each, for calibration.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    name = onnx.load(source, load_external_data=False).graph.input[0].name

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds: Iterator[dict[str, np.ndarray]] = iter([{name: image} for image in images])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    prepared = target.with_name(f"prepared-{target.name}")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantize_static(str(prepared), str(target), Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
    prepared.unlink()


def openvino_int8(source: Path, target: Path, images: Sequence[np.ndarray]) -> None:
    """Quantize an ONNX file after training by NNCF, into OpenVINO's format.

    Args:
        source: float32.
        target: the .xml to write; the weights go to a .bin of the same name.
        images: (1, C, H, W) each, for calibration.
    """
    import nncf
    import openvino

    model = openvino.Core().read_model(source)
    quantized = nncf.quantize(model, nncf.Dataset(list(images)), subset_size=len(images))
    openvino.save_model(quantized, target, compress_to_fp16=False)
