"""`gatedconv bench`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gatedconv.cli.saved_networks import example_input, saved_networks

_MOST = 1_000_000  # of any count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument(
        "target",
        metavar="RUN|MODEL|CASE",
        help="a run folder, a saved model, a .pt2 of torch.export, the name of a torchvision model, or one convolution "
        "with closed outputs, such as 'n8 i16 o32 h32 k3 s2 open50': batch, input and output channels, height of the "
        "map, kernel, stride, percentage of outputs that are open; also w width, p padding, d dilation, g groups",
    )
    parser.add_argument("--batch", type=int, nargs="+", metavar="N", help="batch sizes [1 32]")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="measurements of each [15]")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: PyTorch's, 1 for --footprint")
    parser.add_argument(
        "--peers",
        metavar="NAME,...",
        default="all",
        help="the other runtimes to measure: eager, compile, onnxruntime, openvino, mnn, ncnn, litert; all, none [all]",
    )
    parser.add_argument(
        "--reduced",
        action="store_true",
        help="also the peers that compute in fewer bits, bf16 or int8 calibrated on random images, each with its error",
    )
    parser.add_argument("--size", type=int, metavar="N", help="height and width of the images, if not the model's")
    parser.add_argument(
        "--energy", action="store_true", help="also the joules of a call, where the machine has a counter"
    )
    parser.add_argument(
        "--footprint",
        action="store_true",
        help="what ships instead: file, package, memory and the first answer of the compact network, kept with the run",
    )
    parser.add_argument("--all-settings", action="store_true", help="every setting of a runtime, not only its best")


def run(arguments: argparse.Namespace) -> int:
    """Measure the networks of the target, in our engine and in other runtimes, and print a table."""
    import torch

    from gatedconv.bench.comparison import compare_runtimes

    _check(arguments)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if _is_case(arguments.target):
        return _layer(arguments)
    if arguments.footprint:
        return _footprint(arguments)
    arguments.batch = arguments.batch or [1, 32]
    settings = _settings(arguments.peers, arguments.reduced)
    rows, failures, energy = [], {}, []
    for name, (network, size) in _networks(arguments.target, arguments.size).items():
        for batch in arguments.batch:
            x = example_input(network, batch, size)
            comparison = compare_runtimes(name, network, x, settings=settings)
            comparison.rounds(arguments.rounds)
            rows += comparison.rows()
            failures.update(comparison.failures)
            if arguments.energy:
                energy.append(_energy(name, network, x))
    _print(rows, failures, arguments.all_settings)
    for line in energy:
        print(line)
    return 0


def _is_case(target: str) -> bool:
    from gatedconv.bench.conv_case import ConvCase

    return ConvCase.is_meant(target) and not Path(target).exists()


def _layer(arguments: argparse.Namespace) -> int:
    """Measure one convolution in our operator and in PyTorch's, and print a table."""
    from gatedconv.bench.conv_case import ConvCase, compare_layers

    case = ConvCase.parse(arguments.target)
    _refuse(arguments, "a single convolution", ("batch", "size", "energy", "footprint", "reduced", "peers"))
    comparison = compare_layers(case)
    comparison.rounds(arguments.rounds)
    _print(comparison.rows(), comparison.failures, arguments.all_settings)
    return 0


def _refuse(arguments: argparse.Namespace, what: str, names: Sequence[str]) -> None:
    """Raise ValueError for the first of these options that was given: it is not for `what`."""
    given = [name for name in names if getattr(arguments, name) not in (None, False, "all")]
    if given:
        option = given[0].replace("_", "-")
        raise ValueError(f"{option}: not for {what}, got --{option} with {arguments.target!r}")


def _print(rows: list[Any], failures: dict[tuple[str, str], str], all_settings: bool) -> None:
    """Print the table, and what was not measured."""
    from gatedconv.bench.comparison import bench_table, best_rows

    print(bench_table(rows if all_settings else best_rows(rows, "ms_min")))
    for (provider, setting), reason in failures.items():
        print(f"not measured: {provider}, {setting}: {reason}")


def _footprint(arguments: argparse.Namespace) -> int:
    """Print the footprint of the compact network in each runtime, and keep it for `gatedconv report html`."""
    import dataclasses
    import json
    import tempfile

    from gatedconv._io import write_atomic
    from gatedconv.bench.footprint import measure_footprints
    from gatedconv.cli.saved_networks import compact_network
    from gatedconv.report.footprint_table import FILE_NAME, footprint_rows
    from gatedconv.report.tables import text_table

    _refuse(arguments, "--footprint", ("energy", "reduced", "peers", "all_settings"))
    batch, *more = arguments.batch or [1]
    if more:
        raise ValueError(f"batch: expected one for --footprint, got {len(more) + 1}")
    target = Path(arguments.target)
    network = compact_network(target)[1].eval()
    size = None if arguments.size is None else (example_input(network).shape[1], arguments.size, arguments.size)
    with tempfile.TemporaryDirectory() as folder:
        found = measure_footprints(
            network,
            example_input(network, batch, size),
            Path(folder),
            rounds=arguments.rounds,
            threads=arguments.threads or 1,
        )
    rows = [dataclasses.asdict(row) for row in found]
    if target.is_dir():
        write_atomic(target / FILE_NAME, (json.dumps(rows, indent=2) + "\n").encode())
    print(text_table(*footprint_rows(rows)))
    for row in found:
        if row.note:
            print(f"not measured: {row.runtime}: {row.note}")
    return 0


def _energy(name: str, network: Any, x: Any) -> str:
    """One line: the joules of a call in eager mode, or why they cannot be measured."""
    import torch

    from gatedconv.measure.energy import EnergyMeter, energy_per_call

    meter = EnergyMeter(x.device)
    wait = torch.cuda.synchronize if x.is_cuda else None
    joules = energy_per_call(lambda: network(x), meter, synchronize=wait)
    result = f"not measurable here: {meter.reason}" if joules is None else f"{joules:.6g} J ({meter.source})"
    return f"energy of one call, {name}, batch {len(x)}, eager: {result}"


def _check(arguments: argparse.Namespace) -> None:
    from gatedconv.train.options import MAX_THREADS

    for name, values, most in (
        ("batch", arguments.batch or [], _MOST),
        ("rounds", [arguments.rounds], _MOST),
        ("threads", [arguments.threads], MAX_THREADS),
        ("size", [arguments.size], _MOST),
    ):
        given = [value for value in values if value is not None]
        if given and min(given) < 1:
            raise ValueError(f"{name}: expected at least 1, got {min(given)}")
        if given and max(given) > most:
            raise ValueError(f"{name}: expected at most {most}, got {max(given)}")


def _settings(peers: str, reduced: bool) -> list[Any]:
    from gatedconv.bench.runtimes import OURS, PROVIDERS, REDUCED, SETTINGS

    others = [name for name in PROVIDERS if name != OURS]
    wanted = {"all": others, "none": []}.get(peers, [name.strip() for name in peers.split(",")])
    unknown = sorted(set(wanted) - set(others))
    if unknown:
        raise ValueError(f"peers: expected some of {', '.join(others)}, all or none; got {unknown[0]!r}")
    known = SETTINGS + REDUCED if reduced else SETTINGS
    return [setting for setting in known if setting.provider == OURS or setting.provider in wanted]


def _networks(target: str, size: int | None) -> dict[str, tuple[Any, tuple[int, int, int] | None]]:
    """Name -> network in eval mode and the (C, H, W) of its images, None for the network's own."""
    wanted = None if size is None else (3, size, size)
    path = Path(target)
    if path.suffix == ".pt2":
        network, own = _exported(path)
        return {path.stem: (network, own if size is None else (own[0], size, size))}
    if path.exists() or path.suffix or len(path.parts) > 1:
        found = {name: network.eval() for name, network in saved_networks(path).items()}
        if size is None:
            return {name: (network, None) for name, network in found.items()}
        return {name: (net, (example_input(net).shape[1], size, size)) for name, net in found.items()}
    return {target: (_torchvision(target), wanted or (3, 224, 224))}


def _exported(path: Path) -> tuple[Any, tuple[int, int, int]]:
    import torch

    class Exported(torch.nn.Module):
        """An exported program is always in eval mode, and its own `train` and `eval` raise."""

        def __init__(self, program: torch.nn.Module) -> None:
            super().__init__()
            self.program = program

        def forward(self, x: torch.Tensor) -> Any:
            return self.program(x)

        def train(self, mode: bool = True) -> Exported:
            return self

    if not path.is_file():
        raise ValueError(f"{path}: expected a .pt2 of torch.export, found nothing there")
    try:
        program = torch.export.load(path)
    except Exception as error:  # a damaged or foreign archive may raise anything
        raise ValueError(f"{path}: torch.export cannot load it: {error}") from error
    shapes = [
        tuple(node.meta["val"].shape)
        for node in program.graph.find_nodes(op="placeholder")
        if node.name in program.graph_signature.user_inputs
    ]
    if len(shapes) != 1 or len(shapes[0]) != 4:
        raise ValueError(f"{path}: expected a network of one input (N, C, H, W), got {shapes}")
    channels, height, width = (int(length) for length in shapes[0][1:])
    return Exported(program.module()), (channels, height, width)


def _torchvision(name: str) -> Any:
    try:
        from torchvision import models
    except ImportError as error:
        raise ImportError(
            f"{name}: no such file, and torchvision, which may have a model of that name, is not installed"
        ) from error
    if name not in models.list_models(module=models):
        raise ValueError(f"{name}: expected a run folder, a model file or a torchvision model, found none of them")
    return models.get_model(name, weights=None).eval()
