"""Fine-tune a pretrained torchvision network on a folder of images and cut it, in one training run.

python examples/finetune.py imagefolder:machines --gate none --save machines.pt          (the "pretrained" one)
python examples/finetune.py imagefolder:animals --weights machines.pt --mac-target 0.5 --out animals.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torchvision
from torch import nn

import gatedconv
from gatedconv.data import EvalBatches, load_data
from gatedconv.train.config import TrainConfig
from gatedconv.train.finish import reestimate_batchnorm
from gatedconv.train.loop import train, train_batches
from gatedconv.train.metrics import evaluate


def pretrained(name: str, weights: Path | None, classes: int) -> nn.Module:
    """The network with a new classifier; every other weight from the file, where one is given."""
    model = torchvision.models.get_model(name, weights=None, num_classes=classes)
    if weights is not None:
        own = model.state_dict()
        stored = torch.load(weights, weights_only=True)
        fitting = {key: value for key, value in stored.items() if key in own and value.shape == own[key].shape}
        model.load_state_dict({key: value for key, value in fitting.items() if not key.startswith("fc.")}, strict=False)
    return model


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="imagefolder:PATH, npz:PATH or another source of gatedconv train")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--gate", default="both", choices=("none", "layer", "channel", "both"))
    parser.add_argument("--mac-target", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--save", type=Path, help="write the dense weights, to start from later")
    parser.add_argument("--out", type=Path, help="write the cut network, a file for gatedconv.load")
    arguments = parser.parse_args()

    data = load_data(arguments.data, image_size=arguments.image_size)
    example = torch.zeros(2, *data.image_shape)
    torch.manual_seed(0)
    model = pretrained(arguments.model, arguments.weights, data.num_classes)
    dense_macs = gatedconv.count_macs(model, example[:1])
    if arguments.gate != "none":
        model = gatedconv.gate_model(model, arguments.gate, example_input=example)
        print(f"{len(gatedconv.gates(model))} gates reach {model.conversion.reachable_macs:.0%} of the MACs")
    config = TrainConfig(
        epochs=arguments.epochs, lr=arguments.lr, batch_size=64, gate=arguments.gate, mac_weight=4.0,
        mac_target=arguments.mac_target, gate_lr_factor=5.0, device="cpu", channels_last=False,
    )  # fmt: skip
    for epoch in train(model, data, config):
        print(f"epoch {epoch.epoch}: loss {epoch.train_loss:.3f}, top-1 {epoch.test_top1:.1f} %")
    if arguments.save:
        torch.save(model.state_dict(), arguments.save)
    if arguments.gate == "none":
        return
    frozen = gatedconv.freeze(model, EvalBatches(data, "train"))
    reestimate_batchnorm(frozen, train_batches(config, data))
    small = gatedconv.compact(frozen.eval(), example)
    _, top1 = evaluate(small, EvalBatches(data, "test"))
    macs = gatedconv.count_macs(small, example[:1])
    print(f"cut: top-1 {top1:.1f} %, {macs / 1e6:.1f} of {dense_macs / 1e6:.1f} M MACs ({macs / dense_macs:.0%}), "
          f"agreement {frozen.consensus.agreement:.1%}")  # fmt: skip
    if arguments.out:
        gatedconv.save(small, arguments.out)


if __name__ == "__main__":
    main()
