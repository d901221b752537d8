"""Train a YOLO detector with gates in Ultralytics' own trainer; what the gates leave open becomes a smaller detector.

    python examples/yolo_trainer.py coco8.yaml --model yolov8n.yaml --epochs 100 --out small.safetensors

The first argument is a data set as Ultralytics describes one. The network stays of their class, and their trainer,
augmentation, losses and validation stay as they are: `add_gates` adds three callbacks.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from ultralytics import YOLO
from ultralytics.utils.torch_utils import unwrap_model

import gatedconv


def add_gates(yolo: YOLO, target: float, image_size: int) -> dict[str, Any]:
    """Let `yolo.train` gate the network.

    Args:
        yolo: a detector whose training has not begun.
        target: share of the MACs that is left.
        image_size: pixels of a side; MACs are counted at this size.

    Returns:
        a dict that has, after training, the compact detector as "model", and "macs" and "dense_macs" of one image.
    """
    example, result = torch.zeros(1, 3, image_size, image_size), {}

    def gate(trainer: Any) -> None:
        """The trainer builds its network with gates, before it looks for parameters to train."""
        build = trainer.get_model

        def build_gated(*args: Any, **kwargs: Any) -> torch.nn.Module:
            model = build(*args, **kwargs)
            result["dense_macs"] = gatedconv.count_macs(model, example)
            return gatedconv.gate_model(model, "channel", example_input=example)

        trainer.get_model = build_gated
        # It would fold the norms into the convolutions, and the gates behind them with them: `finish` does it instead.
        trainer.final_eval = lambda: None

    def add_losses(trainer: Any) -> None:
        model = unwrap_model(trainer.model)
        detect = model.init_criterion()

        def criterion(predictions: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
            loss, items = detect(predictions, batch)
            gates = 3 * gatedconv.polarization_loss(model) + 4 * gatedconv.mac_target_loss(model, target=target)
            return loss.sum() + len(batch["img"]) * gates, items  # theirs is a sum over the images

        model.criterion = criterion

    def finish(trainer: Any) -> None:
        """Freeze the averaged network by the open rates of training, compact it, and validate what is left."""
        averaged = trainer.ema.ema.float().cpu()
        small = gatedconv.compact(gatedconv.freeze(averaged), example)
        result.update(model=small, macs=gatedconv.count_macs(small, example))
        trainer.ema.ema = small.to(trainer.device)
        result["metrics"] = trainer.validator(trainer)

    yolo.add_callback("on_pretrain_routine_start", gate)
    yolo.add_callback("on_train_start", add_losses)
    yolo.add_callback("on_train_end", finish)
    return result


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a YAML file of a data set, as Ultralytics takes")
    parser.add_argument("--model", default="yolov8n.yaml", help="a network (.yaml) or pretrained weights (.pt)")
    parser.add_argument("--mac-target", type=float, default=0.5, help="share of the MACs that is left")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=640)
    parser.add_argument("--device", default="cpu", help="one device [cpu]")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--out", type=Path, help="write the compact detector, a file for gatedconv.load")
    arguments = parser.parse_args()
    if "," in arguments.device:
        parser.error("--device: expected one device; on several, Ultralytics trains in processes without the callbacks")
    return arguments


def main() -> None:
    """See the module's docstring."""
    arguments = parsed()
    yolo = YOLO(arguments.model)
    result = add_gates(yolo, arguments.mac_target, arguments.image_size)
    yolo.train(
        data=arguments.data,
        epochs=arguments.epochs,
        batch=arguments.batch_size,
        imgsz=arguments.image_size,
        device=arguments.device,
        workers=arguments.workers,
        amp=False,  # its check downloads another network
        plots=False,
    )
    if arguments.out:
        gatedconv.save(result["model"], arguments.out)
    score = result["metrics"]["metrics/mAP50-95(B)"]
    print(f"mAP50-95 {score:.3f}, {result['macs'] / 1e6:.1f} of {result['dense_macs'] / 1e6:.1f} M MACs")


if __name__ == "__main__":
    main()
