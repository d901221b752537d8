"""Fine-tune a pretrained network on a folder of images and cut it, in one training run.

python examples/finetune.py imagefolder:animals --model timm/tf_efficientnet_lite0 --weights download --out cut

`--weights` is "download" for the library's own pretrained weights, or a file: a state dict of the same network,
under its own names or, tensor by tensor, in the same order.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gatedconv
from gatedconv.data import EvalBatches, ImageData, load_data
from gatedconv.environment import provenance
from gatedconv.train import EpochMetrics, TrainConfig, evaluate, train
from gatedconv.train.recipe import train_batches


def pretrained(name: str, weights: str | None, classes: int) -> nn.Module:
    """A network of torchvision or timm with a new classifier, and every other weight from `weights`."""
    library, _, short = name.rpartition("/")
    download = weights == "download"
    if library == "timm":
        import timm

        model: nn.Module = timm.create_model(short, pretrained=download, num_classes=classes)
    else:
        import torchvision

        model = torchvision.models.get_model(short, num_classes=classes)
        if download:
            original = torchvision.models.get_model(short, weights="DEFAULT")
            model.load_state_dict(fitting(original.state_dict(), model.state_dict()), strict=False)
    if weights is not None and not download:
        stored = torch.load(weights, weights_only=True, map_location="cpu")
        model.load_state_dict(fitting(stored, model.state_dict()), strict=False)
    if weights is not None:
        soften(model, classes)
    return model


def soften(model: nn.Module, classes: int) -> None:
    """Start the new classifier at zero.

    One for few classes may start with large weights (timm's EfficientNets: up to 1 / sqrt(classes)), whose errors
    wash the pretrained features away before it has learned anything.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == classes]
    for parameter in layers[-1].parameters() if layers else ():
        nn.init.zeros_(parameter)


def fitting(stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stored tensors that have a place in the network: all of them but the classifier of other classes."""
    if not stored.keys() & own.keys() and len(stored) == len(own):  # the same network in other words
        stored = dict(zip(own, stored.values(), strict=True))
    found = {name: value for name, value in stored.items() if name in own and value.shape == own[name].shape}
    if len(found) < len(own) - 2:
        missing = sorted(own.keys() - found.keys())
        raise SystemExit(f"the weights are of another network: {len(missing)} tensors have no match, as {missing[:3]}")
    return found


def gated_copy(model: nn.Module, arguments: argparse.Namespace, example: Tensor) -> nn.Module:
    """The network with gates; its weights and what it computes stay."""
    gated = gatedconv.gate_model(model, arguments.gate, example_input=example)
    print(f"{len(gatedconv.gates(gated))} gates reach {gated.conversion.reachable_macs:.0%} of the MACs")
    return gated


def settings(arguments: argparse.Namespace) -> TrainConfig:
    """The recipe: gates are shut in order of rank between 20 and 60 % of the run, and cut out after 70 % of it."""
    gated: dict[str, Any] = {
        "gate": arguments.gate, "polar_schedule": "constant", "mac_target": arguments.mac_target,
        "mac_control": "rank", "mac_ramp": (0.2, 0.6), "consensus_at": 0.7, "gate_lr_factor": 0.1,
    }  # fmt: skip
    return TrainConfig(
        epochs=arguments.epochs, lr=arguments.lr, batch_size=32, weight_decay=1e-4, device="cpu", channels_last=False,
        seed=arguments.seed, **(gated if arguments.gate != "none" else {"gate": "none"}),
    )  # fmt: skip


def trained(model: nn.Module, data: ImageData, config: TrainConfig, phase: str) -> list[EpochMetrics]:
    """Train the model in place; its epochs."""
    history = []
    for epoch in train(model, data, config, phase=phase):
        print(f"{phase}, epoch {epoch.epoch}: loss {epoch.train_loss:.3f}, top-1 {epoch.test_top1:.1f} %", flush=True)
        history.append(epoch)
    return history


def figures(model: nn.Module, data: ImageData, example: Tensor) -> dict[str, Any]:
    """Top-1 on the test images, MACs of one image, parameters."""
    _, top1 = evaluate(model, EvalBatches(data, "test"))
    macs = gatedconv.count_macs(model, example[:1])
    return {"top1": top1, "macs": macs, "params": sum(p.numel() for p in model.parameters())}


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="imagefolder:PATH, npz:PATH or another source of gatedconv train")
    parser.add_argument("--model", default="resnet18", help="a torchvision network, or timm/NAME")
    parser.add_argument("--weights", help='"download" or a file; none trains from scratch')
    parser.add_argument("--gate", default="both", choices=("none", "layer", "channel", "both"))
    parser.add_argument("--mac-target", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the cut network, a file for gatedconv.load")
    parser.add_argument("--result", type=Path, help="write what came out as JSON")
    return parser.parse_args()


def main() -> None:
    """See the module's docstring."""
    arguments = parsed()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    data = load_data(arguments.data, image_size=arguments.image_size)
    example = torch.zeros(2, *data.image_shape)
    model = pretrained(arguments.model, arguments.weights, data.num_classes)
    result: dict[str, Any] = {"dense_macs": gatedconv.count_macs(model, example[:1])}
    if arguments.gate != "none":
        model = gated_copy(model, arguments, example)
    config = settings(arguments)
    if arguments.gate == "none":
        history = trained(model, data, config, "dense")
    else:
        history = trained(model, data, config, "gated")
        frozen = gatedconv.freeze(model, EvalBatches(data, "train"))  # the gates agree on a part
        result["agreement"] = frozen.consensus.agreement
        gatedconv.re_estimate_batchnorm(frozen, train_batches(config, data))
        model = gatedconv.compact(frozen.eval(), example[:1])  # the rest goes
        history += trained(model, data, config, "cut")
    gatedconv.re_estimate_batchnorm(model, train_batches(config, data))
    result |= figures(model.eval(), data, example)
    print(f"top-1 {result['top1']:.1f} %, {result['macs'] / 1e6:.1f} of {result['dense_macs'] / 1e6:.1f} M MACs")
    if arguments.out:
        gatedconv.save(model, arguments.out)
    if arguments.result:
        result["top1_by_epoch"] = [epoch.test_top1 for epoch in history]
        result["images"] = {"train": len(data.train_images), "test": len(data.test_images)}
        kept = {name: value for name, value in vars(arguments).items() if isinstance(value, (str, int, float))}
        kept |= {name: Path(kept[name]).name for name in ("data", "weights") if kept.get(name)}
        result |= {"arguments": kept, **provenance(torch.device("cpu"))}
        arguments.result.parent.mkdir(parents=True, exist_ok=True)
        arguments.result.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
