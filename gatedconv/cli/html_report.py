"""`gatedconv report html RUN...`: read what is there of each run, and write one page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gatedconv._io import write_atomic
from gatedconv.report.html import RunView, html_page
from gatedconv.train.folder import RunFolder


def write_page(targets: list[Path], output: Path) -> Path:
    """Write the page about run folders; a run that is broken or not finished is on it, with the reason.

    Raises:
        ValueError: none of the folders holds anything of a run.
        OSError: the page cannot be written.
    """
    views = [read_view(target) for target in targets]
    if not any(view.config or view.history or view.summary for view in views):
        raise ValueError(views[0].problems[0])
    write_atomic(output, html_page(views).encode())
    return output


def read_view(path: Path) -> RunView:
    """What can be read of a run."""
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
    if summary is None and not problems:
        problems.append(f"not finished after {len(history)} epochs; gatedconv train --resume {path} goes on")
    return RunView(str(path), config, history, summary, problems)
