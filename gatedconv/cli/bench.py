"""`gatedconv bench`."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

from gatedconv.cli.networks import example_input, saved_networks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("target", type=Path, metavar="RUN|MODEL", help="a run folder or a saved model")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1, 32], metavar="N", help="batch sizes [1 32]"
    )
    parser.add_argument("--rounds", type=int, default=21, metavar="N", help="measurements of each [21]")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: PyTorch's")


def run(arguments: argparse.Namespace) -> int:
    """Measure the networks of the target in turns and print a table."""
    import torch

    from gatedconv.deploy.latency import measure_latency
    from gatedconv.report import latency_table

    if min(arguments.batch) < 1:
        raise ValueError(f"batch: expected at least 1, got {min(arguments.batch)}")
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ValueError(f"threads: expected at least 1, got {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    contestants = _contestants(arguments.target)
    first = next(iter(contestants.values()))
    rows = []
    for batch in arguments.batch:
        measured = measure_latency(contestants, example_input(first, batch), rounds=arguments.rounds)
        rows += [(name, batch, latency) for name, latency in measured.items()]
    print(latency_table(rows))
    return 0


def _contestants(target: Path) -> dict[str, Any]:
    """Every network of the target in eager PyTorch, and in our engine where there is one."""
    networks: dict[str, Any] = {name: network.eval() for name, network in saved_networks(target).items()}
    engine = getattr(importlib.import_module("gatedconv"), "Engine", None)
    if engine is None:
        return networks
    engines = {
        f"{name}, engine": engine(network, example_input(network)) for name, network in networks.items()
    }
    return networks | engines
