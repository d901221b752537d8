"""Gate, freeze, cut and export real architectures; the numbers of docs/models.md come from here.

python -m tests.convert.architectures                 the named list
python -m tests.convert.architectures --random 100    so many timm networks drawn at random
python -m tests.convert.architectures NAME...         these alone
python -m tests.convert.architectures --write         docs/models.md from what was kept

Rows are kept under results/architectures, one line each; a network that has one there is not examined again
unless its name is given.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import gatedconv
from tests.convert.zoo import NAMED, build, drawn, randomize

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "results" / "architectures"
TOLERANCE = 1e-4  # of the difference between the outputs of two images, fp32
MASKS: tuple[float | str, ...] = (0.7, 0.3, "one", "closed")


@dataclass
class Row:
    """What became of one architecture.

    ``errors`` are relative to the difference between two images, ``seconds`` those of one core.
    """

    name: str
    size: int = 0
    gates: int = 0
    skipped: int = 0
    reach: float = 0.0
    removed: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    macs_off: dict[str, float] = field(default_factory=dict)
    onnx: float | None = None
    engine: float | None = None
    trained: bool = False
    seconds: tuple[float, float] = (0.0, 0.0)
    failures: list[str] = field(default_factory=list)

    @property
    def error(self) -> float:
        """The largest of them."""
        return max(self.errors.values(), default=float("nan"))

    @property
    def ok(self) -> bool:
        """Gated, cut and exact for every mask."""
        return not self.failures and self.gates > 0 and self.error <= TOLERANCE


def random_masks(gates: dict[str, nn.Module], kind: float | str, seed: int) -> dict[str, Tensor]:
    """Open with a probability, one channel of each gate, or nothing at all."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, gate in gates.items():
        size = gate.num_gates
        mask = torch.zeros(size, dtype=torch.bool)
        if kind == "one":
            mask[int(torch.randint(size, (1,), generator=generator))] = True
        elif kind != "closed":
            mask = torch.rand(size, generator=generator) < kind
        masks[name] = mask
    return masks


def first(output: object) -> Tensor:
    """The logits of a model that may return more."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]  # type: ignore[index]
    return output


def examine(name: str, *, gate: str = "both", position: str = "after", onnx: bool = False, train: bool = False) -> Row:
    """Gate one architecture, force masks, freeze, cut, and compare."""
    row = Row(name)
    try:
        model, images = build(name)
        randomize(model, images)
        row.size = images.shape[-1]
        started = time.process_time()
        gated = gatedconv.gate_model(model, gate, position=position, example_input=images)
        gating = time.process_time() - started
        with torch.no_grad():
            dense = first(model(images))
            row.errors["gated"] = relative(first(gated(images)), dense, dense)
        row.gates, row.skipped = len(gatedconv.gates(gated)), len(gated.conversion.skipped)
        row.reach = gated.conversion.reachable_macs
        total = gatedconv.count_macs(model, images[:1])
    except Exception as error:  # an architecture that fails is a row of the table
        row.failures.append(_short("gate", error))
        return row
    cutting = 0.0
    for kind in MASKS:
        try:
            masks = random_masks(gatedconv.gates(gated), kind, seed=3)
            frozen = gatedconv.freeze(gated, masks=masks)
            started = time.process_time()
            small = gatedconv.compact(frozen, images)
            cutting = max(cutting, time.process_time() - started)
            with torch.no_grad():
                expected, found = first(frozen(images)), first(small(images))
            row.errors[str(kind)] = relative(found, expected, dense)
            macs = gatedconv.count_macs(small, images[:1])
            row.removed[str(kind)] = 1 - macs / total
            promised = gatedconv.expected_macs(gated, {k: m.double() for k, m in masks.items()})
            row.macs_off[str(kind)] = float(promised) / total - macs / total
            if kind == 0.7:
                _runtimes(row, small, images, expected, dense, onnx)
        except Exception as error:
            row.failures.append(_short(f"cut at {kind}", error))
    row.seconds = (gating, cutting)
    if train:
        row.trained = trains(gated, images, row)
    return row


def _runtimes(row: Row, small: nn.Module, images: Tensor, expected: Tensor, dense: Tensor, onnx: bool) -> None:
    if onnx:
        import onnxruntime

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            gatedconv.export(small, path, images, format="onnx")
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            found = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
        row.onnx = relative(torch.from_numpy(found), expected, dense)
    if hasattr(gatedconv, "Engine"):
        with torch.no_grad():
            row.engine = relative(first(gatedconv.Engine(small, images)(images)), expected, dense)


def trains(gated: nn.Module, images: Tensor, row: Row) -> bool:
    """Two steps of SGD with the method's losses: finite, with a gradient on every gate."""
    try:
        gated.train()
        optimizer = torch.optim.SGD(gated.parameters(), lr=0.01)
        batch = images.repeat(2, 1, 1, 1)
        for _ in range(2):
            output = first(gated(batch))
            loss = output.square().mean() + gatedconv.polarization_loss(gated) + gatedconv.mac_target_loss(gated)
            optimizer.zero_grad()
            loss.backward()
            if not torch.isfinite(loss):
                row.failures.append("train: the loss is not finite")
                return False
            for name, gate in gatedconv.gates(gated).items():
                gradient = gate.fc2.bias.grad
                if gradient is None or not torch.isfinite(gradient).all():
                    row.failures.append(f"train: no finite gradient on {name}")
                    return False
            optimizer.step()
        return True
    except Exception as error:
        row.failures.append(_short("train", error))
        return False


def relative(found: Tensor, expected: Tensor, dense: Tensor) -> float:
    """The largest error over the difference between the dense outputs of the two images."""
    return float((found - expected).abs().max() / (dense[0] - dense[1]).abs().max())


def _short(stage: str, error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{stage}: {text[:160]} ({Path(where.filename).name}:{where.lineno})"


HEAD = (
    "network",
    "pixels",
    "gates",
    "reach",
    "removed at 70 %",
    "at 30 %",
    "one open",
    "none open",
    "MACs off (points)",
    "largest error",
    "ONNX",
    "Engine",
    "trains",
    "remarks",
)


def table(rows: Iterable[Row]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    for row in rows:
        cells = [row.name, str(row.size), str(row.gates), f"{row.reach:.1%}"]
        cells += [f"{row.removed[str(k)]:.1%}" if str(k) in row.removed else "-" for k in MASKS]
        cells += [" / ".join(_points(row.macs_off.get(str(k))) for k in MASKS), f"{row.error:.0e}"]
        cells += ["-" if e is None else f"{e:.0e}" for e in (row.onnx, row.engine)]
        cells += ["yes" if row.trained else "no", "; ".join(row.failures).replace("|", "/")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _points(share: float | None) -> str:
    """Percentage points."""
    return "-" if share is None else "0" if abs(share) < 5e-6 else f"{100 * share:+.1f}"


def line(row: Row) -> str:
    """One row, for people who wait."""
    off = " / ".join(map(_points, row.macs_off.values()))
    cells = [
        "ok  " if row.ok else "FAIL",
        row.name,
        f"{row.size}px",
        f"{row.gates} gates",
        f"reach {row.reach:.1%}",
        f"error {row.error:.1e}",
        f"onnx {row.onnx}",
        f"engine {row.engine}",
        f"macs off {off}",
        f"gate {row.seconds[0]:.1f}s cut {row.seconds[1]:.1f}s",
        "; ".join(row.failures),
    ]
    return " ".join(cells)


def kept(path: Path) -> dict[str, Row]:
    """The rows of a file, the last one of each network."""
    if not path.exists():
        return {}
    stored = (json.loads(text) for text in path.read_text().splitlines())
    return {row["name"]: Row(**{**row, "seconds": tuple(row["seconds"])}) for row in stored}


def keep(path: Path, row: Row) -> None:
    """Add a row to a file; the last one of a network counts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {**kept(path), row.name: row}
    path.write_text("".join(json.dumps(dataclasses.asdict(r)) + "\n" for r in rows.values()))


def document(text: str, rows: list[Row], mark: str) -> str:
    """The text with the table between its marks written again."""
    begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    good = sum(row.ok for row in rows)
    says = f"{good} of {len(rows)} gated, cut and exact.{_times(rows)}"
    return f"{before}{begin}\n{table(rows)}\n\n{says}\n{end}{after}"


def _times(rows: list[Row]) -> str:
    """What gating and the slowest of the four cuts took, where a ResNet-50 is among the rows."""
    timed = [row for row in rows if row.name == "torchvision/resnet50" and row.seconds[0]]
    return "".join(
        f"\n\n{row.name} took {row.seconds[0]:.1f} s to gate and {row.seconds[1]:.1f} s to cut, of one core."
        for row in timed
    )


def written(text: str) -> str:
    """docs/models.md with the tables of the rows that are kept."""
    for file, mark in (("named", "named networks"), ("random", "drawn at random")):
        text = document(text, list(kept(KEPT / f"{file}.jsonl").values()), mark)
    return text


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--random", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gate", default="both")
    parser.add_argument("--position", default="after")
    parser.add_argument("--no-onnx", action="store_true")
    parser.add_argument("--keep", type=Path, help="a file for the rows; results/architectures/... where none is given")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if arguments.write:
        models = ROOT / "docs" / "models.md"
        models.write_text(written(models.read_text()))
        return
    file = arguments.keep or (None if arguments.names else KEPT / f"{'random' if arguments.random else 'named'}.jsonl")
    known = kept(file) if file else {}
    names = drawn(arguments.random, arguments.seed) if arguments.random else NAMED
    for name in arguments.names or [n for n in names if n not in known]:
        row = examine(name, gate=arguments.gate, position=arguments.position, onnx=not arguments.no_onnx, train=True)
        print(line(row), flush=True)
        if file:
            keep(file, row)


if __name__ == "__main__":
    main()
