"""`gatedconv report`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from gatedconv._io import write_atomic
from gatedconv.train.checkpoint import naming_file
from gatedconv.train.folder import RunFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.epilog = (
        "run NAME...: run what is missing of the experiment table (patterns such as 'table4-*' too), exit code 3 when "
        "--max-minutes or SIGTERM ended it (143 where SIGTERM came before it had begun), 1 when a run failed. "
        "energy NAME...: measure the joules per image of finished runs, alone on the device. "
        "tables, plots: rebuild docs/results.md and its figures from the ledger. "
        "list: every experiment and what is done. html RUN...: one page about run folders. A run folder that is called "
        "like one of them is ./run."
    )
    parser.add_argument(
        "targets",
        nargs="+",
        metavar="TARGET",
        help="run folders; or html RUN..., run NAME..., energy NAME..., tables, plots, list",
    )
    parser.add_argument("--plots", action=argparse.BooleanOptionalAction, default=True, help="draw plots [on]")
    parser.add_argument(
        "--output", type=Path, default=Path("report.html"), metavar="FILE", help="page of html RUN... [report.html]"
    )
    group = parser.add_argument_group("experiments")
    group.add_argument("--seed", type=int, action="append", metavar="N", help="this seed alone; may be repeated")
    group.add_argument("--jobs", type=int, default=1, metavar="N", help="processes side by side [1]")
    group.add_argument(
        "--beside", type=int, default=0, metavar="N", help="other runs on the device: energy is not measured [0]"
    )
    group.add_argument("--max-minutes", type=float, default=0.0, metavar="X", help="stop after this; 0 never [0]")
    group.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="folder of run folders [runs]")
    group.add_argument(
        "--results", type=Path, default=Path("results"), metavar="DIR", help="folder of the ledger [results]"
    )
    group.add_argument("--docs", type=Path, default=Path("docs"), metavar="DIR", help="folder of results.md [docs]")
    group.add_argument(
        "--source", action="append", default=[], metavar="NAME=SOURCE", help="where a data set lies: cifar10=npz:PATH"
    )
    group.add_argument("--device", default="", help="auto, cpu, cuda or cuda:N [the recipe's]")
    group.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads [the recipe's]")
    group.add_argument("--amp", default="", help="mixed precision: off, auto, bf16 or fp16 [the recipe's]")
    group.add_argument("--cuda-graph", action="store_true", help="replay each training step as one CUDA graph")


def run(arguments: argparse.Namespace) -> int:
    """Report on run folders, or run and report the experiment table."""
    first, *rest = arguments.targets
    if first in ("run", "energy"):
        return _run_experiments(arguments, first, rest)
    if first == "html":
        from gatedconv.cli.html_report import write_page

        if not rest:
            raise ValueError("report html: expected run folders after it, got none")
        print(f"written: {write_page([Path(target) for target in rest], arguments.output)}")
        return 0
    if first in ("tables", "plots", "list"):
        if rest:
            raise ValueError(f"report {first}: expected nothing after it, got {rest[0]!r}")
        return {"tables": _tables, "plots": _plots, "list": _list}[first](arguments)
    return _report_folders([Path(target) for target in arguments.targets], arguments.plots)


def _run_experiments(arguments: argparse.Namespace, what: str, names: list[str]) -> int:
    from reproduce.files import Bench
    from reproduce.runner import energy_of_images, run_experiments, select

    if not names:
        raise ValueError(f"report {what}: expected names of experiments; `gatedconv report list` has them")
    if arguments.beside < 0:
        raise ValueError(f"beside: expected at least 0, got {arguments.beside}")
    if arguments.jobs < 1:
        raise ValueError(f"jobs: expected at least 1, got {arguments.jobs}")
    if not 0 <= arguments.max_minutes < float("inf"):
        raise ValueError(f"max_minutes: expected at least 0, got {arguments.max_minutes}")
    sources = {}
    for text in arguments.source:
        name, equals, source = text.partition("=")
        if not name or not equals or not source:
            raise ValueError(f"source: expected NAME=SOURCE, got {text!r}")
        sources[name] = source
    deadline = time.monotonic() + 60 * arguments.max_minutes if arguments.max_minutes else None
    bench = Bench(
        arguments.runs, arguments.results, sources, arguments.device, arguments.threads, deadline, arguments.beside,
        amp=arguments.amp, cuda_graph=arguments.cuda_graph,
    )  # fmt: skip
    keys = select(names, arguments.seed)
    return energy_of_images(bench, keys) if what == "energy" else run_experiments(bench, keys, arguments.jobs)


def _tables(arguments: argparse.Namespace) -> int:
    from reproduce.ledger import read_ledger
    from reproduce.results import results_text, write_block
    from reproduce.rows import present_recipes

    path = arguments.docs / "results.md"
    if not path.is_file():
        raise ValueError(f"{path}: expected the results page, found nothing there")
    rows = read_ledger(_results(arguments) / "ledger.jsonl")
    images = [image.name for image in (arguments.docs / "images").glob("*.png")]
    text = write_block(path, "experiments", lambda: results_text(rows, present_recipes(), images))
    write_atomic(path, text.encode())
    print(f"written: {path}")
    return 0


def _results(arguments: argparse.Namespace) -> Path:
    """The folder of the ledger; a name that is mistyped shall not make a page of nothing."""
    folder: Path = arguments.results
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected the folder of the ledger, found none")
    return folder


def _plots(arguments: argparse.Namespace) -> int:
    from reproduce.figures import draw_figures
    from reproduce.ledger import read_ledger
    from reproduce.results import present_rows
    from reproduce.rows import present_recipes

    rows = present_rows(read_ledger(_results(arguments) / "ledger.jsonl"), present_recipes())
    folder = arguments.docs / "images"
    with naming_file(folder):
        for path in draw_figures(rows, arguments.results / "epochs", folder):
            print(f"drawn: {path}")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from gatedconv.report.tables import text_table
    from reproduce.ledger import read_ledger
    from reproduce.results import left_out, present_rows, runs_of
    from reproduce.rows import present_recipes
    from reproduce.table import all_experiments

    rows, recipes = read_ledger(arguments.results / "ledger.jsonl"), present_recipes()
    present = present_rows(rows, recipes)
    lines = []
    for each in all_experiments().values():
        told = [f"{len(runs_of(each, present))} of {len(each.seeds)}"]
        told += [f"{count} {reason}" for reason, count in left_out(each, rows, recipes).items()]
        lines.append([each.name, each.kind, ", ".join(told)])
    print(text_table(["experiment", "kind", "seeds done"], lines))
    return 0


def _report_folders(targets: list[Path], plots: bool) -> int:
    """Draw the plots of each run and print its table; for several runs, one table of all."""
    from gatedconv.report import comparison_table, runs_table

    folders = [RunFolder(target) for target in targets]
    for folder in folders:
        folder.read_config()
    if plots:
        for folder in folders:
            for path in draw_run(folder):
                print(f"drawn: {path}")
    finished = {str(folder.path): folder.read_summary() for folder in folders if folder.summary.is_file()}
    for folder in folders:
        if str(folder.path) not in finished:
            print(f"{folder.path}: not finished; gatedconv train --resume {folder.path} goes on")
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
