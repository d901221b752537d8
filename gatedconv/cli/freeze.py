"""`gatedconv freeze`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("target", type=Path, metavar="RUN", help="a run folder; need not be finished")
    parser.add_argument(
        "--bn-reestimate", action=argparse.BooleanOptionalAction, help="default: as the run was configured"
    )
    parser.add_argument("--latency", action=argparse.BooleanOptionalAction, help="default: as the run was configured")


def run(arguments: argparse.Namespace) -> int:
    """Freeze, compact, measure and export from the newest checkpoint; write the run's summary again."""
    from gatedconv.cli.progress import make_progress
    from gatedconv.report import comparison_table
    from gatedconv.train.build import load_images
    from gatedconv.train.run_dir import RunFolder
    from gatedconv.train.trainer import Trainer

    folder = RunFolder(arguments.target)
    config = folder.read_config()
    if config.gate == "none":
        raise ValueError(f"{folder.path}: expected a run with gates, found one with gate 'none'")
    given = {name: getattr(arguments, name) for name in ("bn_reestimate", "latency")}
    config = dataclasses.replace(config, **{name: value for name, value in given.items() if value is not None})
    data = load_images(config)
    with folder.locked(), make_progress() as callback:
        trainer = Trainer(config, data, folder, callback)
        summary = trainer.finish(trainer.load())
    print(comparison_table(summary))
    return 0
