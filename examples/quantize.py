"""Quantize a compact network to int8 after training, and measure what that loses and gains.

    gatedconv train --preset fast-c10 --data npz:cifar10.npz --folder runs/small
    python examples/quantize.py runs/small/compact.safetensors cifar10.npz --out small-int8.xml

The archive has train_images, train_labels, test_images and test_labels, images uint8 (N, H, W, 3). The network goes
to ONNX, NNCF calibrates it on training images, and OpenVINO runs it: pip install openvino nncf.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import nncf
import numpy as np
import openvino
import torch
from torch import Tensor, nn

import gatedconv

Forward = Callable[[Tensor], Tensor]


def load_images(path: Path, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Some training and all test images (N, C, H, W), normalized as `gatedconv train` does; the test labels (M,)."""
    found = np.load(path)
    train, test = (torch.from_numpy(found[f"{split}_images"]).permute(0, 3, 1, 2) for split in ("train", "test"))
    pixels = train.double() / 255
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3), correction=0)

    def normalized(images: Tensor) -> Tensor:
        return (images.float() / 255 - mean.float().view(-1, 1, 1)) / std.float().view(-1, 1, 1)

    return normalized(train[:count]), normalized(test), torch.from_numpy(found["test_labels"]).flatten().long()


def quantized(path: Path, images: Tensor) -> openvino.Model:
    """The network of an ONNX file with int8 weights and activations."""
    model = openvino.Core().read_model(path)
    dataset = nncf.Dataset([image.numpy() for image in images.split(1)])
    return nncf.quantize(model, dataset, subset_size=len(images))


def runner(model: openvino.Model | Path, threads: int) -> Forward:
    """OpenVINO for batches of any size, in float32 where the model is not quantized."""
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    return lambda x: torch.from_numpy(request.infer({0: x.numpy()})[0].copy())


def answers(run: Forward, images: Tensor) -> Tensor:
    """Scores (M, classes)."""
    return torch.cat([run(batch) for batch in images.split(250)])


def least_ms(runs: dict[str, Forward], x: Tensor, rounds: int) -> dict[str, float]:
    """The fastest call of each, in ms; interleaved, so that a disturbance affects all."""
    least = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            time.sleep(0.02)  # threads of the one before may still spin
            for _ in range(20):
                start = time.perf_counter()
                run(x)
                least[name] = min(least[name], 1e3 * (time.perf_counter() - start))
    return least


def measure(
    model: nn.Module, images: tuple[Tensor, Tensor, Tensor], arguments: argparse.Namespace
) -> list[dict[str, float | str]]:
    """A row for each way to run the network: top-1, distance to the original, ms a call."""
    train, test, labels = images
    example = test[:1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        gatedconv.export(model, path, example, format="onnx")
        int8 = quantized(path, train)
        openvino.save_model(int8, arguments.out, compress_to_fp16=False)
        runs: dict[str, Forward] = {
            "gatedconv.Engine, float32": gatedconv.Engine(model, example, threads=arguments.threads),
            "OpenVINO, float32": runner(path, arguments.threads),
            "OpenVINO, int8": runner(int8, arguments.threads),
        }
    times = {n: least_ms(runs, test[:n].contiguous(), arguments.rounds) for n in (1, 32)}
    expected, rows = answers(model, test), []
    for name, run in runs.items():
        scores = answers(run, test)
        best = scores.argmax(1)
        rows.append(
            {
                "runtime": name,
                "top1": 100 * float((best == labels).float().mean()),
                "same_top1": 100 * float((best == expected.argmax(1)).float().mean()),
                "error": float((scores - expected).abs().max() / expected.abs().max()),
                "ms_1": times[1][name],
                "ms_32": times[32][name],
            }
        )
    return rows


@torch.inference_mode()
def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a file of gatedconv.save, such as runs/NAME/compact.safetensors")
    parser.add_argument("data", type=Path, help="an .npz of the images that it was trained on")
    parser.add_argument("--out", type=Path, default=Path("int8.xml"), help="OpenVINO's file [int8.xml]")
    parser.add_argument("--images", type=int, default=300, help="for calibration [300]")
    parser.add_argument("--rounds", type=int, default=15, help="of measuring each runtime [15]")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each runtime [all cores]")
    parser.add_argument("--result", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = gatedconv.load(arguments.model).eval()
    images = load_images(arguments.data, arguments.images)
    rows = measure(model, images, arguments)
    print(f"{'runtime':28}{'top-1':>8}{'same':>8}{'error':>10}{'ms, batch 1':>13}{'batch 32':>10}")
    for row in rows:
        print(
            f"{row['runtime']:28}{row['top1']:>8.2f}{row['same_top1']:>8.2f}{row['error']:>10.1e}"
            f"{row['ms_1']:>13.3f}{row['ms_32']:>10.2f}"
        )
    if arguments.result:
        size = arguments.out.stat().st_size + arguments.out.with_suffix(".bin").stat().st_size
        given = {"calibration_images": len(images[0]), "rounds": arguments.rounds, "threads": arguments.threads}
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
        software = {name: version(name) for name in ("gatedconv", "torch", "nncf", "openvino")}
        result = {
            "commit": found.stdout.strip() or None,
            "versions": software,
            "int8_bytes": size,
            **given,
            "rows": rows,
        }
        arguments.result.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
