"""Gate, train, freeze, compact and export real architectures; the numbers of docs/models.md come from here.

python -m tests.convert.architectures                 the named list
python -m tests.convert.architectures --tasks         detectors, segmentation and others
python -m tests.convert.architectures --random 100    so many of timm's convolutional networks drawn at random
python -m tests.convert.architectures --fresh 60      so many networks of every task from torchvision and timm
python -m tests.convert.architectures NAME...         these alone
python -m tests.convert.architectures --write         docs/models.md from what was kept

Rows are kept under results/architectures, one line each; a network that has one there is not examined again
unless its name is given. Every network has a process of its own, with a time limit.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import multiprocessing
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

import gatedconv
from tests.convert.zoo import NAMED, TASKS, Subject, build, drawn, fresh, randomize
from tests.tolerances import OF_TWO_IMAGES

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "results" / "architectures"
MASKS: tuple[float | str, ...] = (0.7, 0.3, "one", "closed")
SECTIONS = (
    ("named", "named networks"),
    ("tasks", "other tasks"),
    ("random", "drawn at random"),
    ("fresh", "every task"),
)
DRAWN = {"named": len(NAMED), "tasks": len(TASKS), "random": 100, "fresh": 60}  # networks of each list
LIMIT = 900  # seconds for one network


@dataclass
class Row:
    """What became of one architecture.

    ``errors`` are relative to the difference between two images, ``seconds`` those of one core. ``left`` says why a
    network has no gates; ``kept`` whether gated and compact network are of the dense one's class; ``sizes`` is the
    number of image sizes at which they were compared; ``training`` the largest error of outputs, gradients and buffers
    in training mode, None where the dense network does not train on its example.
    """

    name: str
    size: int = 0
    gates: int = 0
    skipped: int = 0
    reach: float = 0.0
    removed: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    macs_off: dict[str, float] = field(default_factory=dict)
    sizes: int = 0
    training: float | None = None
    kept: bool = False
    left: str = ""
    onnx: float | None = None
    engine: float | None = None
    trained: bool = False
    seconds: tuple[float, float] = (0.0, 0.0)
    failures: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def error(self) -> float:
        """The largest of them."""
        return max((*self.errors.values(), self.training or 0.0), default=float("nan"))

    @property
    def ok(self) -> bool:
        """Gated, compacted and exact for every mask, or left alone with a reason."""
        exact = self.gates > 0 and self.error <= OF_TWO_IMAGES
        return not self.failures and (exact or bool(self.left))


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


def call(model: nn.Module, example: Any) -> Any:
    """The model's output on images, or on a tuple of arguments; random numbers are those of one seed."""
    torch.manual_seed(0)
    return model(*example) if isinstance(example, tuple) else model(example)


def tensors(output: Any) -> list[Tensor]:
    """What a model returned, as a list."""
    return [t for t in tree_flatten(output)[0] if isinstance(t, Tensor) and t.is_floating_point()]


def examine(name: str, *, gate: str = "both", position: str = "after", onnx: bool = False, train: bool = False) -> Row:
    """Gate one architecture, force masks, freeze, compact, and compare."""
    row = Row(name)
    try:
        subject = build(name)
        model, example = subject.model, subject.example
        randomize(model, example)
        row.size = subject.size
        started = time.process_time()
        try:
            gated = gatedconv.gate_model(model, gate, position=position, example_input=example)
        except (TypeError, ValueError) as refusal:
            row.left = str(refusal).splitlines()[0]
            if not row.left.startswith(("gate_model: no place", "gate_model: example_input")):
                raise
            return row
        gating = time.process_time() - started
        row.kept = type(gated) is type(model)
        row.gates, row.skipped = len(gatedconv.gates(gated)), len(gated.conversion.skipped)
        row.reach = gated.conversion.reachable_macs
        compared(row, "gated", model, gated, subject)
        row.training = training_error(model, gated, subject.training)
        total = gatedconv.count_macs(model, example[:1]) if isinstance(example, Tensor) else None
    except Exception as error:  # an architecture that fails is a row of the table
        row.failures.append(_short("gate", error))
        return row
    compacting = 0.0
    for kind in MASKS:
        try:
            masks = random_masks(gatedconv.gates(gated), kind, seed=3)
            frozen = gatedconv.freeze(gated, masks=masks)
            started = time.process_time()
            small = gatedconv.compact(frozen, example)
            compacting = max(compacting, time.process_time() - started)
            row.kept = row.kept and type(small) is type(model)
            row.sizes = compared(row, str(kind), frozen, small, subject, scale=model)
            if total is not None:
                macs = gatedconv.count_macs(small, example[:1])
                row.removed[str(kind)] = 1 - macs / total
                promised = gatedconv.expected_macs(gated, {k: m.double() for k, m in masks.items()})
                row.macs_off[str(kind)] = float(promised) / total - macs / total
            if kind == 0.7 and isinstance(example, Tensor) and example.dim() == 4:
                _runtimes(row, small, example, call(frozen, example), call(model, example), onnx)
        except Exception as error:
            row.failures.append(_short(f"compact at {kind}", error))
    row.seconds = (gating, compacting)
    if train:
        row.trained = trains(gated, subject.training, row)
    return row


@torch.no_grad()
def compared(
    row: Row, key: str, source: nn.Module, result: nn.Module, subject: Subject, scale: nn.Module | None = None
) -> int:
    """Note the largest error over the sizes that the source takes; returns how many these are.

    Where it is too large, it is that of double precision, and a remark has the one of single: a network may amplify
    rounding, also that of the constants that replace a part of it; twice the network's own error is no difference.
    """
    count = 0
    for example in (subject.example, *subject.others):
        try:
            expected = call(source, example)
            dense = expected if scale is None else call(scale, example)
        except Exception:  # a size that the network does not take
            if example is subject.example:
                raise
            continue
        error = relative(call(result, example), expected, dense)
        if not error <= OF_TWO_IMAGES:
            wide = tree_map(lambda t: t.double() if t.is_floating_point() else t, example)
            exact, got = (call(copy.deepcopy(network).double(), wide) for network in (source, result))
            dense = exact if scale is None else call(copy.deepcopy(scale).double(), wide)
            single, own, error = error, relative(expected, exact, dense), relative(got, exact, dense)
            if error <= OF_TWO_IMAGES:
                row.remarks.append(f"{key}: {single:.0e} in single precision, amplified rounding")
            elif max(single, error) <= 2 * own:  # constants are rounded, and stay so in double precision
                row.remarks.append(f"{key}: {single:.0e}, where rounding costs the frozen network {own:.0e}")
                error = 0.0
        row.errors[key] = max(row.errors.get(key, 0.0), error)
        count += 1
    return count


def training_error(model: nn.Module, gated: nn.Module, arguments: tuple[Any, ...]) -> float | None:
    """One step of both in training mode, the new gates open: outputs, gradients and buffers, by their names."""
    results: list[tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]] = []
    for network in (copy.deepcopy(model).train(), copy.deepcopy(gated).train()):
        try:
            out = tensors(call(network, arguments))
            sum(t.square().mean() for t in out if t.requires_grad).backward()  # type: ignore[union-attr]
        except Exception:
            if not results:
                return None
            raise
        gradients = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
        results.append(([t.detach() for t in out], gradients, dict(network.named_buffers())))
    (outputs, gradients, buffers), (found, mine, kept) = results
    largest = max([1e-30, *(float(g.abs().max()) for g in gradients.values())])
    errors = [float((f - o).abs().max() / o.abs().max().clamp(min=1e-30)) for f, o in zip(found, outputs, strict=True)]
    errors += [float((mine[n] - g).abs().max()) / largest for n, g in gradients.items()]
    errors += [float((kept[n] - b).abs().max() / b.abs().max().clamp(min=1)) for n, b in buffers.items() if b.numel()]
    return max(errors)


def _runtimes(row: Row, small: nn.Module, images: Tensor, expected: Any, dense: Any, onnx: bool) -> None:
    if onnx:
        import onnxruntime

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            gatedconv.export(small, path, images, format="onnx")
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            found = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        row.onnx = relative([torch.from_numpy(f) for f in found], expected, dense)
    with torch.no_grad():
        row.engine = relative(call(gatedconv.Engine(small, images), images), expected, dense)


def trains(gated: nn.Module, arguments: tuple[Any, ...], row: Row) -> bool:
    """Two steps of SGD with the method's losses: finite, with a gradient on every gate."""
    try:
        gated.train()
        optimizer = torch.optim.SGD(gated.parameters(), lr=0.01)
        for _ in range(2):
            out = [t for t in tensors(call(gated, arguments)) if t.requires_grad]
            loss = sum((t.square().mean() for t in out), torch.zeros(()))
            loss = loss + gatedconv.polarization_loss(gated) + gatedconv.mac_target_loss(gated)
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
        if row.training is None:  # nor does the dense network
            return False
        row.failures.append(_short("train", error))
        return False


def relative(found: Any, expected: Any, dense: Any) -> float:
    """The largest error of a tensor over the difference between two images in the dense network's."""
    worst = 0.0
    for f, e, d in zip(tensors(found), tensors(expected), tensors(dense), strict=True):
        if f.shape != e.shape:
            return float("inf")
        span = (d[0] - d[1]).abs().max() if len(d) == 2 else d.abs().max() if d.numel() else torch.ones(())
        if e.numel() and not torch.equal(f, e):
            worst = max(worst, float((f - e).abs().max() / span))
    return worst


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
    "sizes",
    "largest error",
    "in training",
    "class kept",
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
        cells += [" / ".join(_points(row.macs_off.get(str(k))) for k in MASKS), str(row.sizes)]
        cells += [_exponent(max(row.errors.values(), default=None)), _exponent(row.training)]
        cells += ["yes" if row.kept else "no", _exponent(row.onnx), _exponent(row.engine)]
        remarks = [f"left alone: {row.left}"] if row.left else row.failures + row.remarks
        cells += ["yes" if row.trained else "no", "; ".join(remarks).replace("|", "/")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _exponent(error: float | None) -> str:
    return "-" if error is None else "0" if error == 0 else f"{error:.0e}"


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
        f"{row.sizes} sizes",
        f"error {row.error:.1e}",
        f"training {row.training}",
        "class kept" if row.kept else "ANOTHER CLASS",
        f"onnx {row.onnx}",
        f"engine {row.engine}",
        f"macs off {off}",
        f"gate {row.seconds[0]:.1f}s compact {row.seconds[1]:.1f}s",
        row.left,
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


def document(text: str, rows: list[Row], mark: str, drawn: int) -> str:
    """The text with the table between its marks written again."""
    begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    left = sum(bool(row.left) for row in rows)
    says = f"{sum(row.ok for row in rows) - left} of {len(rows)} gated, compacted and exact"
    says += f", {left} left alone" if left else ""
    says += f"; the class kept in {sum(row.kept for row in rows)}."
    says += f" Measured are {len(rows)} of the {drawn} networks." if len(rows) < drawn else ""
    return f"{before}{begin}\n{table(rows)}\n\n{says}{_times(rows)}\n{end}{after}"


def _times(rows: list[Row]) -> str:
    """What gating and the slowest of the four compactions took, where a ResNet-50 is among the rows."""
    timed = [row for row in rows if row.name == "torchvision/resnet50" and row.seconds[0]]
    return "".join(
        f"\n\n{row.name} took {row.seconds[0]:.1f} s to gate and {row.seconds[1]:.1f} s to compact, of one core."
        for row in timed
    )


def written(text: str) -> str:
    """docs/models.md with the tables of the rows that are kept."""
    for file, mark in SECTIONS:
        text = document(text, list(kept(KEPT / f"{file}.jsonl").values()), mark, DRAWN[file])
    return text


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--tasks", action="store_true")
    parser.add_argument("--random", type=int, default=0)
    parser.add_argument("--fresh", type=int, default=0)
    parser.add_argument("--seed", type=int, help="of the draw; 0 for --random, 1 for --fresh")
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
    kind = "random" if arguments.random else "fresh" if arguments.fresh else "tasks" if arguments.tasks else "named"
    file = arguments.keep or (None if arguments.names else KEPT / f"{kind}.jsonl")
    known = kept(file) if file else {}
    names: Iterable[str] = TASKS if arguments.tasks else NAMED
    if arguments.random:
        names = drawn(arguments.random, arguments.seed or 0)
    elif arguments.fresh:
        names = fresh(arguments.fresh, 1 if arguments.seed is None else arguments.seed)
    options = {"gate": arguments.gate, "position": arguments.position, "onnx": not arguments.no_onnx, "train": True}
    for name in arguments.names or [n for n in names if n not in known]:
        row = _apart(name, options)
        print(line(row), flush=True)
        if file:
            keep(file, row)


def _apart(name: str, options: dict[str, Any]) -> Row:
    """The row of a network, examined in a process of its own."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_send, args=(sender, name, options))
    process.start()
    sender.close()
    try:
        if not receiver.poll(LIMIT):
            return Row(name, failures=[f"more than {LIMIT} seconds"])
        return receiver.recv()  # type: ignore[no-any-return]
    except EOFError:
        return Row(name, failures=["the process ended without a result"])
    finally:
        process.kill()
        process.join()


def _send(sender: Any, name: str, options: dict[str, Any]) -> None:
    sender.send(examine(name, **options))


if __name__ == "__main__":
    main()
