"""`gatedconv train`."""

from __future__ import annotations

import argparse
import re
from contextlib import nullcontext
from pathlib import Path

from gatedconv.cli.config_flags import add_config_flags, given_flags, merge_settings
from gatedconv.train.config import TrainConfig, make_config
from gatedconv.train.run_dir import RunFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.epilog = (
        "precedence: preset < config file < flag. Exit code 3: max_minutes or SIGTERM ended the run; resume it. "
        "Several GPUs or machines: torchrun ... -m gatedconv train --folder DIR ...; its exit code is then 0, "
        "since torchrun restarts a job after any other."
    )
    parser.add_argument(
        "--preset", metavar="NAME", help="named settings: demo, fast-c10, best-{c10,c100}-r{20,32,44,56,110}"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings from a TOML file")
    # Two names: to torchrun's parser --run is an ambiguous abbreviation of its own options.
    parser.add_argument(
        "--run", "--folder", type=Path, dest="run", metavar="DIR", help="folder to write; default: a new one in runs/"
    )
    parser.add_argument("--resume", type=Path, metavar="DIR", help="resume the run in this folder")
    add_config_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Train, draw the plots, print the results."""
    from gatedconv.cli.progress import make_progress
    from gatedconv.report import comparison_table
    from gatedconv.train.callbacks import Callback
    from gatedconv.train.distributed import launched
    from gatedconv.train.stopping import exit_code, stop_on_sigterm
    from gatedconv.train.trainer import run as run_training

    rank, world = launched()
    flags = given_flags(arguments)
    if arguments.resume is not None:
        if arguments.preset or arguments.config or arguments.run:
            raise ValueError("resume: the run has its settings; leave out --preset, --config and --run")
        folder = RunFolder(arguments.resume)
        stored = folder.read_config()
        config = make_config({**vars(stored), **flags})
    else:
        config = merge_settings(arguments.preset, arguments.config, flags)
        if world > 1 and arguments.run is None:
            raise ValueError(
                "folder: expected --folder DIR with several processes: a restarted job must find its folder"
            )
        folder = RunFolder(arguments.run or _new_folder(config))
    with make_progress() if rank == 0 else nullcontext(Callback()) as callback, stop_on_sigterm() as stop:
        try:
            summary = run_training(config, folder, resume=arguments.resume is not None, callback=callback, stop=stop)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_interrupted(folder)) from None
    if summary is None:
        return exit_code()
    if rank > 0:
        return 0
    _draw(folder)
    print(comparison_table(summary))
    print(f"written to {folder.path}; next:")
    print(f"  gatedconv report html {folder.path}    one page: curves, gates, results")
    print(f"  gatedconv bench {folder.path}          latency, compared with other runtimes")
    return 0


def _interrupted(folder: RunFolder) -> str:
    if not folder.holds_checkpoint():
        return "interrupted before an epoch was finished"
    return f"interrupted; resume from the last finished epoch with: gatedconv train --resume {folder.path}"


def _draw(folder: RunFolder) -> None:
    """Draw the plots, unless matplotlib is missing or the disk is full."""
    from gatedconv.cli.report import draw_run

    try:
        draw_run(folder)
    except (ImportError, OSError) as error:
        print(f"plots not drawn: {error}")


def _new_folder(config: TrainConfig) -> Path:
    """The first of runs/NAME-seedN, runs/NAME-seedN-2, ... that does not exist."""
    source = Path(config.data.partition(":")[2]).stem or config.data
    label = re.sub(r"[^A-Za-z0-9._-]+", "-", config.name or f"{config.model}-{config.gate}-{source}")
    base = Path("runs") / f"{label}-seed{config.seed}"
    number, folder = 1, base
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder
