"""`python -m reproduce run | tables | plots | list`, from the checkout; README.md has the details."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gatedconv._io import naming_file, write_atomic
from gatedconv.cli import Parser, run_command
from gatedconv.report.tables import text_table
from reproduce.experiments import all_experiments
from reproduce.ledger import Rows, read_ledger
from reproduce.result_tables import left_out, present_rows, replace_block, results_text, runs_of
from reproduce.rows import present_recipes
from reproduce.runner import run_experiments, select
from reproduce.schedule import planned, status
from reproduce.workplace import Key, Workplace


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code: as those of `gatedconv`, and 1 where a run failed."""
    given = list(sys.argv[1:] if arguments is None else arguments)

    def call() -> int:
        parsed = _parser().parse_args(given)
        code: int = parsed.verb(parsed)
        return code

    return run_command(" ".join(["reproduce", *given[:1]]), call)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m reproduce", description="The paper's experiments: run them, and show the results.")
    verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=Parser)
    results = Parser(add_help=False)
    results.add_argument(
        "--results", type=Path, default=Path("results"), metavar="DIR", help="folder of the ledger [results]"
    )
    docs = Parser(add_help=False)
    docs.add_argument("--docs", type=Path, default=Path("docs"), metavar="DIR", help="folder of results.md [docs]")
    run = verbs.add_parser(
        "run",
        parents=[results],
        help="run what is missing of the experiment table",
        epilog="Exit code 3: --max-minutes or SIGTERM ended it, the same command continues; 1: a run failed.",
    )
    _add_machine(run)
    run.add_argument(
        "--plan", default="", help="the runs of a plan, in its order, or those that NAMEs choose: cpu or gpu"
    )
    run.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at a time [1]")
    run.add_argument("--cuda-graph", action="store_true", help="replay each training step as one CUDA graph")
    run.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads [the recipe's]")
    run.add_argument("--amp", default="", help="mixed precision: off, auto, bf16 or fp16 [the recipe's]")
    run.set_defaults(verb=_run)
    for name, verb, text in (
        ("tables", _tables, "write the tables of docs/results.md from the ledger"),
        ("plots", _plots, "draw the figures of docs/results.md from the ledger"),
    ):
        verbs.add_parser(name, parents=[results, docs], help=text).set_defaults(verb=verb)
    shown = verbs.add_parser("list", parents=[results], help="every experiment, and which seeds are done")
    shown.add_argument("--plan", default="", help="the runs of a plan in order, and how far each is: cpu or gpu")
    shown.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="folder of run folders [runs]")
    shown.set_defaults(verb=_list)
    return parser


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="experiments, or patterns such as 'table4-*'")
    parser.add_argument("--seed", type=int, action="append", metavar="N", help="only this seed; may be repeated")
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="folder of run folders [runs]")
    parser.add_argument(
        "--source", action="append", default=[], metavar="NAME=SOURCE", help="source of a data set: cifar10=npz:PATH"
    )
    parser.add_argument("--device", default="", help="auto, cpu, cuda or cuda:N [the recipe's]")
    parser.add_argument(
        "--other-runs",
        type=int,
        default=0,
        metavar="N",
        help="other runs on the device; energy is not measured then [0]",
    )
    parser.add_argument("--max-minutes", type=float, default=0.0, metavar="X", help="stop after this time; 0 never [0]")


def _workplace(arguments: argparse.Namespace) -> Workplace:
    if arguments.other_runs < 0:
        raise ValueError(f"other-runs: expected at least 0, got {arguments.other_runs}")
    if not 0 <= arguments.max_minutes < float("inf"):
        raise ValueError(f"max_minutes: expected at least 0, got {arguments.max_minutes}")
    sources = {}
    for text in arguments.source:
        name, equals, source = text.partition("=")
        if not name or not equals or not source:
            raise ValueError(f"source: expected NAME=SOURCE, got {text!r}")
        sources[name] = source
    return Workplace(
        arguments.runs,
        arguments.results,
        sources,
        arguments.device,
        arguments.threads,
        deadline=time.monotonic() + 60 * arguments.max_minutes if arguments.max_minutes else None,
        other_runs=arguments.other_runs,
        amp=arguments.amp,
        cuda_graph=arguments.cuda_graph,
    )


def _run(arguments: argparse.Namespace) -> int:
    if arguments.jobs < 1:
        raise ValueError(f"jobs: expected at least 1, got {arguments.jobs}")
    return run_experiments(_workplace(arguments), _keys(arguments), arguments.jobs)


def _keys(arguments: argparse.Namespace) -> list[Key]:
    """The runs that a plan, names and seeds choose together."""
    if not arguments.plan and not arguments.names:
        raise ValueError("run: expected names of experiments, or --plan")
    if not arguments.plan:
        return select(arguments.names, arguments.seed)
    chosen = set(select(arguments.names, None)) if arguments.names else None
    keys = [key for key in planned(arguments.plan) if chosen is None or key in chosen]
    return [key for key in keys if not arguments.seed or key[1] in arguments.seed]


def _ledger(folder: Path) -> Rows:
    """The rows of a results folder, which must exist: a mistyped name would empty the page."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected the folder of the ledger, found none")
    return read_ledger(folder / "ledger.jsonl")


def _tables(arguments: argparse.Namespace) -> int:
    path = arguments.docs / "results.md"
    if not path.is_file():
        raise ValueError(f"{path}: expected the results page, found nothing there")
    rows = _ledger(arguments.results)
    images = [image.name for image in (arguments.docs / "images").glob("*.png")]
    text = replace_block(path, "experiments", results_text(rows, present_recipes(), images))
    write_atomic(path, text.encode())
    print(f"written: {path}")
    return 0


def _plots(arguments: argparse.Namespace) -> int:
    from reproduce.figures import draw_figures

    rows = present_rows(_ledger(arguments.results), present_recipes())
    folder = arguments.docs / "images"
    with naming_file(folder):
        for path in draw_figures(rows, arguments.results / "epochs", folder):
            print(f"drawn: {path}")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    if arguments.plan:
        return _list_plan(arguments)
    rows, recipes = read_ledger(arguments.results / "ledger.jsonl"), present_recipes()
    present = present_rows(rows, recipes)
    lines = []
    for each in all_experiments().values():
        counts = [f"{len(runs_of(each, present))} of {len(each.seeds)}"]
        counts += [f"{count} {reason}" for reason, count in left_out(each, rows, recipes).items()]
        lines.append([each.name, each.kind, ", ".join(counts)])
    print(text_table(["experiment", "kind", "seeds done"], lines))
    return 0


def _list_plan(arguments: argparse.Namespace) -> int:
    workplace = Workplace(arguments.runs, arguments.results, {})
    rows = present_rows(read_ledger(workplace.ledger), present_recipes())
    lines = [
        [part, name, str(seed), status(workplace, (name, seed), rows)]
        for (name, seed), part in planned(arguments.plan).items()
    ]
    print(text_table(["part", "experiment", "seed", "status"], lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
