"""`gatedconv report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from gatedconv._io import naming_file
from gatedconv.train.run_dir import RunFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.epilog = "gatedconv report html RUN... writes one HTML page instead; a run folder called html is ./html."
    parser.add_argument("targets", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--plots", action=argparse.BooleanOptionalAction, default=True, help="draw plots [on]")


def run(arguments: argparse.Namespace) -> int:
    """Draw the plots of each run and print its table; for several runs, one table of all."""
    from gatedconv.report import comparison_table, runs_table

    folders = [RunFolder(target) for target in arguments.targets]
    for folder in folders:
        folder.read_config()
    if arguments.plots:
        for folder in folders:
            if len(folders) > 1 and not folder.read_metrics():
                continue  # told of below
            for path in draw_run(folder):
                print(f"drawn: {path}")
    finished = {str(folder.path): folder.read_summary() for folder in folders if folder.summary.is_file()}
    for folder in folders:
        if str(folder.path) not in finished:
            print(f"{folder.path}: not finished; resume with: gatedconv train --resume {folder.path}")
    if len(finished) == 1:
        print(comparison_table(next(iter(finished.values()))))
    elif finished:
        print(runs_table(finished))
    return 0


def draw_run(folder: RunFolder) -> list[Path]:
    """Draw what a run's metrics allow; returns the files written.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the disk is full or not writable.
        ValueError: the run has no metrics yet.
    """
    from gatedconv.report import plots

    history = [metrics.as_dict() for metrics in folder.read_metrics()]
    if not history:
        raise ValueError(f"{folder.path}: expected metrics of at least one epoch, found none")
    with naming_file(folder.plots):
        return plots.draw_all(history, folder.plots, title=_title(folder))


def _title(folder: RunFolder) -> str:
    config = folder.read_config()
    gates = "dense" if config.gate == "none" else f"{config.gate} gates"
    return f"{config.model}, {gates}, {config.data.partition(':')[0]}, seed {config.seed}"
