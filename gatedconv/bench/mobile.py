"""Runtimes made for phones, on the CPU and in float32: MNN, ncnn and LiteRT. Each has a converter of its own.

A session, ``mnn_session`` or ``ncnn_session``, needs NumPy alone: footprint.py measures it where PyTorch is not loaded.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gatedconv.bench.exported import Run, made_once, onnx_file


def mnn(network: nn.Module, x: Tensor, folder: Path, threads: int) -> Run:
    """MNN at its high precision, float32; converted from ONNX by the tool in its wheel."""
    run = mnn_session(str(mnn_file(network, x, folder)), x.numpy(), threads)
    return lambda: torch.from_numpy(run())


def mnn_session(path: str, x: np.ndarray, threads: int) -> Callable[[], np.ndarray]:
    """MNN's answer for x (N, C, H, W), from its file of a network."""
    import MNN

    interpreter = MNN.Interpreter(path)
    session = interpreter.createSession({"backend": "CPU", "precision": "high", "numThread": threads})
    into = interpreter.getSessionInput(session)
    interpreter.resizeTensor(into, tuple(x.shape))
    interpreter.resizeSession(session)
    out = interpreter.getSessionOutput(session)
    shape = out.getShape()
    given, host = (
        MNN.Tensor(tuple(array.shape), MNN.Halide_Type_Float, array, MNN.Tensor_DimensionType_Caffe)
        for array in (x, np.empty(shape, np.float32))
    )

    def run() -> np.ndarray:
        into.copyFrom(given)
        interpreter.runSession(session)
        out.copyToHostTensor(host)
        return np.array(host.getNumpyData(), np.float32).reshape(shape)

    return run


def mnn_file(network: nn.Module, x: Tensor, folder: Path) -> Path:
    """MNN's file of a network."""
    source = onnx_file(network, x, folder)

    def convert(path: Path) -> None:
        # Not MNN.tools.mnnconvert, which installs a package that reports what is converted.
        call = "import sys, _tools; _tools.mnnconvert(sys.argv)"
        form = ("-f", "ONNX", "--modelFile", source, "--MNNModel", path, "--bizCode", "none")
        _tool(sys.executable, "-c", call, *form)

    return made_once(folder / "network.mnn", convert)


def ncnn(network: nn.Module, x: Tensor, folder: Path, threads: int) -> Run:
    """Ncnn in float32, image by image, since it has no batches; converted by pnnx."""
    parameters, _ = ncnn_files(network, x, folder)
    run = ncnn_session(str(parameters), x.numpy(), threads)
    return lambda: torch.from_numpy(run())


def ncnn_session(path: str, x: np.ndarray, threads: int) -> Callable[[], np.ndarray]:
    """Ncnn's answer for x (N, C, H, W), from its file of a network's parameters."""
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = threads
    for name in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage", "vulkan_compute"):
        setattr(net.opt, f"use_{name}", False)
    if net.load_param(path) or net.load_model(path.removesuffix("param") + "bin"):
        raise RuntimeError("ncnn cannot read what pnnx has written")

    def answer(image: np.ndarray) -> np.ndarray:
        extractor = net.create_extractor()
        extractor.input("in0", ncnn.Mat(image))
        failed, out = extractor.extract("out0")
        if failed:
            raise RuntimeError(f"ncnn fails with {failed}")
        return np.array(out)

    return lambda: np.stack([answer(image) for image in x])


def ncnn_files(network: nn.Module, x: Tensor, folder: Path) -> tuple[Path, Path]:
    """Ncnn's two files of a network: parameters, weights."""
    import pnnx

    def convert(path: Path) -> None:
        traced = folder / "network.pt"
        torch.jit.trace(network, x[:1]).save(str(traced))
        shape = f"inputshape={list(x[:1].shape)}".replace(" ", "")
        _tool(pnnx.EXEC_PATH, traced, shape, "fp16=0", f"ncnnparam={path}", f"ncnnbin={path.with_suffix('.bin')}")

    parameters = made_once(folder / "network.ncnn.param", convert, ".bin")
    return parameters, parameters.with_suffix(".bin")


def litert(network: nn.Module, x: Tensor, folder: Path, threads: int) -> Run:
    """LiteRT with its XNNPACK kernels, float32; converted from torch.export by litert-torch, for one batch size."""
    from ai_edge_litert.interpreter import Interpreter

    def convert(path: Path) -> None:
        import litert_torch

        litert_torch.convert(network, (x,)).export(str(path))

    path = made_once(folder / f"network-batch{len(x)}.tflite", convert)
    interpreter = Interpreter(str(path), num_threads=threads)
    interpreter.allocate_tensors()
    source, target = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    image = x.numpy()

    def run() -> Tensor:
        interpreter.set_tensor(source, image)
        interpreter.invoke()
        return torch.from_numpy(interpreter.get_tensor(target))

    return run


def _tool(*command: object) -> None:
    """Run a converter in a process of its own: they print, and some exit.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command[:3]} failed: {(done.stderr or done.stdout).strip()[-300:]}")
