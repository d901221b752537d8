"""`gatedconv train`."""

from __future__ import annotations

import argparse
import re
from contextlib import nullcontext
from pathlib import Path

from gatedconv.cli.config_flags import add_config_flags, given_flags, merge_settings
from gatedconv.train.config import TrainConfig, make_config
from gatedconv.train.folder import RunFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.epilog = (
        "precedence: preset < config file < flag. Exit code 3: max_minutes or SIGTERM ended the run; resume it. "
        "Several GPUs or machines: torchrun ... -m gatedconv train --folder DIR ...; exit code 0 then, "
        "whatever else torchrun would start again."
    )
    parser.add_argument("--preset", metavar="NAME", help="named settings: demo, paper-c10-r56-layer, best-c10-r56, ...")
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings from a TOML file")
    # Two names: torchrun's own parser stumbles over --run, a beginning of several of its options.
    parser.add_argument(
        "--run", "--folder", type=Path, dest="run", metavar="DIR", help="folder to write; default: a new one in runs/"
    )
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with the run in this folder")
    add_config_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Train, print the outcome, draw the plots."""
    from gatedconv.cli.progress import make_listener
    from gatedconv.report import comparison_table
    from gatedconv.train.distributed import launched
    from gatedconv.train.listener import Listener
    from gatedconv.train.pipeline import run as run_training
    from gatedconv.train.stopping import exit_code, stop_on_sigterm

    rank, world = launched()
    flags = given_flags(arguments)
    if arguments.resume is not None:
        if arguments.preset or arguments.config or arguments.run:
            raise ValueError("resume: the settings are the run's own; leave out --preset, --config and --run")
        folder = RunFolder(arguments.resume)
        stored = folder.read_config()
        config = make_config({**vars(stored), **flags})
    else:
        config = merge_settings(arguments.preset, arguments.config, flags)
        if world > 1 and arguments.run is None:
            raise ValueError(
                "folder: expected --folder DIR with several processes: a restarted job has to find its folder"
            )
        folder = RunFolder(arguments.run or _new_folder(config))
    with make_listener() if rank == 0 else nullcontext(Listener()) as listener, stop_on_sigterm() as stop:
        try:
            summary = run_training(config, folder, resume=arguments.resume is not None, listener=listener, stop=stop)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_interrupted(folder)) from None
    if summary is None:
        return exit_code()
    if rank > 0:
        return 0
    _draw(folder)
    print(comparison_table(summary))
    print(f"written to {folder.path}")
    return 0


def _interrupted(folder: RunFolder) -> str:
    if not folder.holds_checkpoint():
        return "interrupted before an epoch was finished"
    return f"interrupted; the last finished epoch is on the disk: gatedconv train --resume {folder.path} goes on"


def _draw(folder: RunFolder) -> None:
    """Draw the plots if matplotlib and the disk allow; a run without pictures is still a run."""
    from gatedconv.cli.report import draw_run

    try:
        draw_run(folder)
    except (ImportError, OSError) as error:
        print(f"plots not drawn: {error}")


def _new_folder(config: TrainConfig) -> Path:
    """The first free one of runs/NAME-seedN, runs/NAME-seedN-2, ..."""
    source = Path(config.data.partition(":")[2]).stem or config.data
    label = re.sub(r"[^A-Za-z0-9._-]+", "-", config.name or f"{config.model}-{config.gate}-{source}")
    base = Path("runs") / f"{label}-seed{config.seed}"
    number, folder = 1, base
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder
