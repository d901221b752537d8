"""`gatedconv report html`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gatedconv._io import write_atomic
from gatedconv.report.footprint_table import FILE_NAME, read_footprints
from gatedconv.report.html import RunView, html_page
from gatedconv.train.run_dir import RunFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.epilog = "A run that is damaged or not finished is on the page, with the reason."
    parser.add_argument("targets", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="the page [report.html]")


def run(arguments: argparse.Namespace) -> int:
    """Write the page.

    Raises:
        ValueError: none of the folders contains anything of a run.
        OSError: the page cannot be written.
    """
    views = [read_view(target) for target in arguments.targets]
    if not any(view.config or view.history or view.summary for view in views):
        raise ValueError(views[0].problems[0])
    write_atomic(arguments.out, html_page(views).encode())
    print(f"written: {arguments.out}")
    return 0


def read_view(path: Path) -> RunView:
    """Everything that can be read of a run."""
    folder, problems = RunFolder(path), []

    def attempt(read: Callable[[], Any], empty: Any) -> Any:
        try:
            return read()
        except (ValueError, TypeError, OSError) as error:
            problems.append(str(error))
            return empty

    config = attempt(lambda: vars(folder.read_config()), {})
    history = attempt(lambda: [line.as_dict() for line in folder.read_metrics()], [])
    summary = attempt(folder.read_summary, None) if folder.summary.is_file() else None
    shipped = path / FILE_NAME
    footprint = attempt(lambda: read_footprints(shipped), []) if shipped.is_file() else []
    if summary is None and not problems:
        problems.append(f"not finished after {len(history)} epochs; resume with: gatedconv train --resume {path}")
    return RunView(str(path), config, history, summary, problems, footprint)
