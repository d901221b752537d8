"""`gatedconv export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gatedconv.cli.saved_networks import compact_network, example_input

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "aoti": ".aoti.pt2", "plan": ".plan"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("target", type=Path, metavar="RUN|MODEL", help="a run folder or a saved model")
    parser.add_argument("--format", default="onnx", metavar="{onnx,torch,aoti,plan}", help="what to write [onnx]")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: next to the model")


def run(arguments: argparse.Namespace) -> int:
    """Export the compact network of a run, or the network in a model file."""
    from gatedconv.deploy import export

    if arguments.format not in SUFFIXES:
        raise ValueError(f"format: expected one of {', '.join(SUFFIXES)}, got {arguments.format!r}")
    target: Path = arguments.target
    name, network = compact_network(target)
    folder = target if target.is_dir() else target.parent
    out = arguments.out or folder / (name + SUFFIXES[arguments.format])
    about = _about(target) if arguments.format == "plan" and target.is_dir() else {}
    export(network, out, example_input(network), format=arguments.format, **about)
    print(f"written to {out}")
    return 0


def _about(run: Path) -> dict[str, Any]:
    """The classes and the normalization of a run's images, by its summary."""
    from gatedconv.train.run_dir import RunFolder

    folder = RunFolder(run)
    images = folder.read_summary().get("images") if folder.summary.is_file() else None
    if images is None:
        print(f"the plan names no classes and no normalization: {folder.summary} has none")
        return {}
    return {name: images[name] for name in ("classes", "mean", "std")}
