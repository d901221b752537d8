"""`gatedconv eval`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from torch import nn

from gatedconv.cli.saved_networks import image_size, saved_networks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("target", type=Path, metavar="RUN|MODEL", help="a run folder or a saved model")
    parser.add_argument("--data", metavar="SOURCE", help="data source; default: the run's")
    parser.add_argument("--data-root", metavar="DIR", help="folder for downloaded data")
    parser.add_argument("--image-size", type=int, metavar="N", help="side of imagefolder images")
    parser.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate every finished network of the target and print a table."""
    from gatedconv.report import figures_table
    from gatedconv.train.build import load_images
    from gatedconv.train.config import TrainConfig
    from gatedconv.train.device import resolve_device
    from gatedconv.train.run_dir import RunFolder
    from gatedconv.train.summary import evaluate_network

    networks = saved_networks(arguments.target)
    if arguments.target.is_dir():
        config = RunFolder(arguments.target).read_config()
    elif arguments.data is None:
        raise ValueError(f"data: expected --data SOURCE with a saved model, {arguments.target} names none")
    else:
        config = TrainConfig()
    given = {name: getattr(arguments, name) for name in ("data", "data_root", "image_size", "device")}
    config = dataclasses.replace(config, **{name: value for name, value in given.items() if value is not None})
    data = load_images(config)
    rows = {}
    for name, network in networks.items():
        _require_fit(arguments.target, network, data.image_shape, data.num_classes)
        rows[name] = evaluate_network(network.to(resolve_device(config.device)), config, data)
    print(figures_table(rows))
    return 0


def _require_fit(target: Path, network: nn.Module, image_shape: tuple[int, int, int], num_classes: int) -> None:
    size = image_size(network, image_shape)
    classes = getattr(getattr(network, "fc", None), "out_features", num_classes)
    if size[0] != image_shape[0] or classes != num_classes:
        raise ValueError(
            f"{target}: network for {size[0]} channel(s) and {classes} classes; expected {image_shape[0]} "
            f"and {num_classes}, as in the data"
        )
