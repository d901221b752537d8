"""Fine-tune a pretrained network on a folder of images, prune it on the way, and save what is left.

    python examples/finetune.py animals --model timm/tf_efficientnet_lite0 --weights download --out small.safetensors

The folder holds train/CLASS/*.png and test/CLASS/*.png. `--weights` is "download" for the pretrained weights of
torchvision or timm, or a file: a state dict of the same network, under its own names or, tensor by tensor, in order.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import gatedconv

PRUNE_FROM, PRUNE_TO, FREEZE_AT = 0.2, 0.6, 0.7  # shares of the run: features first, then gates, then what is left
GATE_RATE = 0.1  # gates that learn as fast as from scratch close before the new classifier has learned what matters
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def pretrained(name: str, weights: str | None, classes: int) -> nn.Module:
    """A network of torchvision or timm with a new classifier, and every other weight from `weights`."""
    library, _, short = name.rpartition("/")
    if library == "timm":
        import timm

        model: nn.Module = timm.create_model(short, pretrained=weights == "download", num_classes=classes)
    else:
        model = torchvision.models.get_model(short, num_classes=classes)
    if weights == "download" and library != "timm":
        original = torchvision.models.get_model(short, weights="DEFAULT")
        model.load_state_dict(fitting(original.state_dict(), model.state_dict()), strict=False)
    elif weights not in (None, "download"):
        stored = torch.load(weights, weights_only=True, map_location="cpu")
        model.load_state_dict(fitting(stored, model.state_dict()), strict=False)
    heads = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == classes]
    if weights is not None and heads:  # large errors of a random classifier would wash the pretrained features away
        nn.init.zeros_(heads[-1].weight)
        nn.init.zeros_(heads[-1].bias)
    return model


def fitting(stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stored tensors that have a place in the network: all but the classifier of other classes."""
    if not stored.keys() & own.keys() and len(stored) == len(own):  # the same network under other names
        stored = dict(zip(own, stored.values(), strict=True))
    found = {name: value for name, value in stored.items() if name in own and value.shape == own[name].shape}
    if len(found) < len(own) - 2:
        missing = sorted(own.keys() - found.keys())
        raise SystemExit(f"the weights are of another network: {len(missing)} tensors have no match, as {missing[:3]}")
    return found


def loaders(folder: Path, size: int, batch: int) -> tuple[DataLoader, DataLoader, int]:
    """Training batches, test batches, and the number of classes."""
    common = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    augment = [v2.RandomResizedCrop(size, scale=(0.5, 1)), v2.RandomHorizontalFlip(), *common]
    train = torchvision.datasets.ImageFolder(folder / "train", v2.Compose(augment))
    test = torchvision.datasets.ImageFolder(folder / "test", v2.Compose([v2.Resize((size, size)), *common]))
    return DataLoader(train, batch, shuffle=True, drop_last=True), DataLoader(test, 64), len(train.classes)


def train(model: nn.Module, loader: DataLoader, epochs: range, arguments: argparse.Namespace) -> None:
    """Train through some epochs of the run; a model with gates closes those that matter least per MAC."""
    gates = [p for gate in gatedconv.gates(model).values() for p in gate.parameters()]
    known, total = {id(p) for p in gates}, arguments.epochs
    groups = [{"params": [p for p in model.parameters() if id(p) not in known], "weight_decay": 1e-4}]
    if gates:
        groups.append({"params": gates, "weight_decay": 0.0})
    optimizer = torch.optim.SGD(groups, arguments.lr, momentum=0.9, nesterov=True)
    pruner = gatedconv.GatePruner(model) if gates else None
    for epoch in epochs:
        model.train()
        for step, (images, labels) in enumerate(loader):
            progress = (epoch + step / len(loader)) / total
            loss = functional.cross_entropy(model(images), labels)
            if pruner is not None:
                loss = loss + 3 * gatedconv.polarization_loss(model)
            optimizer.zero_grad()
            loss.backward()
            for group, factor in zip(optimizer.param_groups, (1.0, GATE_RATE), strict=False):
                group["lr"] = factor * arguments.lr * 0.5 * (1 + math.cos(math.pi * progress))
            optimizer.step()
            if pruner is not None and progress >= PRUNE_FROM:
                pruner.step(gatedconv.schedules.falling(progress, arguments.mac_target, PRUNE_FROM, PRUNE_TO))
        print(f"epoch {epoch}: loss of the last batch {loss.item():.3f}", flush=True)
    if pruner is not None:
        pruner.prune(arguments.mac_target)
        pruner.detach()


@torch.no_grad()
def top1(model: nn.Module, loader: DataLoader) -> float:
    """Percent of the test images that the model classifies correctly."""
    model.eval()
    hits = [(model(images).argmax(1) == labels) for images, labels in loader]
    return 100 * float(torch.cat(hits).float().mean())


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with train/CLASS and test/CLASS")
    parser.add_argument("--model", default="resnet18", help="a torchvision network, or timm/NAME")
    parser.add_argument("--weights", help='"download" or a file; none trains from scratch')
    parser.add_argument("--gate", default="both", choices=("none", "layer", "channel", "both"))
    parser.add_argument("--mac-target", type=float, default=0.5, help="share of the MACs that is left")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's")
    parser.add_argument("--out", type=Path, help="write the compact network, a file for gatedconv.load")
    parser.add_argument("--result", type=Path, help="write the figures as JSON")
    return parser.parse_args()


def main() -> None:
    """See the module's docstring."""
    arguments = parsed()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    train_batches, test_batches, classes = loaders(arguments.folder, arguments.image_size, arguments.batch_size)
    example = torch.zeros(2, 3, arguments.image_size, arguments.image_size)
    model = pretrained(arguments.model, arguments.weights, classes)
    result = {"dense_macs": gatedconv.count_macs(model, example[:1])}
    if arguments.gate == "none":
        train(model, train_batches, range(arguments.epochs), arguments)
    else:
        model = gatedconv.gate_model(model, arguments.gate, example_input=example)
        end = round(FREEZE_AT * arguments.epochs)
        train(model, train_batches, range(end), arguments)
        frozen = gatedconv.freeze(model, train_batches)  # each gate by the vote of the images
        gatedconv.re_estimate_batchnorm(frozen, train_batches)
        model = gatedconv.compact(frozen, example)
        result["agreement"] = frozen.consensus.agreement
        print(f"agreement of the gates: {frozen.consensus.agreement:.1%}")
        train(model, train_batches, range(end, arguments.epochs), arguments)
    gatedconv.re_estimate_batchnorm(model, train_batches)
    result |= {"top1": top1(model, test_batches), "macs": gatedconv.count_macs(model, example[:1])}
    print(f"top-1 {result['top1']:.1f} %, {result['macs'] / 1e6:.1f} of {result['dense_macs'] / 1e6:.1f} M MACs")
    if arguments.out:
        gatedconv.save(model, arguments.out)
    if arguments.result:
        result |= {
            "params": sum(p.numel() for p in model.parameters()),
            "arguments": {name: getattr(value, "name", value) for name, value in vars(arguments).items()},
            "versions": {module.__name__: module.__version__ for module in (gatedconv, torch, torchvision)},
        }
        arguments.result.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
