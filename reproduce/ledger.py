"""The ledger of results: one JSON line per finished run, checked when it is read and when it is written."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not a POSIX system: appends are still whole, but two at once may lose one
    fcntl = None  # type: ignore[assignment]

KINDS = ("gated", "dense", "equal_macs", "fixed_at_init", "naive_dropout", "naive_layer")
_NONE = type(None)
_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "dict[str, str]": (dict,),
    "str | None": (str, _NONE),
    "int | None": (int, _NONE),
    "float | None": (int, float, _NONE),
}


class LedgerError(ValueError):
    """A ledger that is damaged, or a row that does not belong into it; the message is for the user."""


@dataclass(frozen=True)
class LedgerRow:
    """A finished run.

    Attributes:
        experiment: name in the experiment table.
        seed: of the run.
        dataset: name of the images; of a file its name, never its place.
        model: network.
        kind: one of `KINDS`.
        top1_last: percent, of the network that would be deployed, after the last epoch.
        macs: of that network, per image (fvcore's count).
        macs_dense: of the same network without gates.
        epochs: passes over the train split that the network was trained for, before the consensus and after.
        device: what it ran on.
        commit: of the source, "+changes" where files differed from it; None where unknown.
        versions: of Python and packages.
        wall_s: seconds of training and finishing.
        evaluated_on: "test", or "val" for choices.
        open_ratio: share of gates in the consensus that are open; None without gates.
        pruning_rate: eq. 11, share of parameters pruned; None without gates.
        polar: polarization (eqs. 6-8) over the training split when the consensus was made.
        agreement: share of the samples' decisions that are those of the consensus, 0 to 1.
        top1_dynamic: percent, before the freeze, gates deciding per sample.
        macs_dynamic: expected MACs of the same.
        top1_whole: percent, of the whole network that taught, after the last epoch; None without a teacher.
        train_macs: multiply-accumulates that the training executed, a teacher's included; None if not known.
        params: parameters of the deployed network.
        energy_j: joules of the training; None where the machine does not tell.
        energy_j_image: joules per image of the deployed network; None where it was not measured.
        energy_reason: why `energy_j` is None; None where it is not, and in rows that are older than the field.
        macs_conv: of `macs`, what convolutions and linear layers have, as most others count; None if not known.
        macs_conv_dense: the same of `macs_dense`.
        jobs: runs that shared the device when this one ended; None in rows that are older than the field.
        recipe: short hash of the recipe; None in rows that are older than the field.
        amp: what the training's mixed precision came to, off, bf16 or fp16; None in older rows.
    """

    experiment: str
    seed: int
    dataset: str
    model: str
    kind: str
    top1_last: float
    macs: float
    macs_dense: float
    epochs: int
    device: str
    commit: str | None
    versions: dict[str, str]
    wall_s: float
    evaluated_on: str = "test"
    open_ratio: float | None = None
    pruning_rate: float | None = None
    polar: float | None = None
    agreement: float | None = None
    top1_dynamic: float | None = None
    macs_dynamic: float | None = None
    top1_whole: float | None = None
    train_macs: float | None = None
    params: int | None = None
    energy_j: float | None = None
    energy_j_image: float | None = None
    energy_reason: str | None = None
    macs_conv: float | None = None
    macs_conv_dense: float | None = None
    jobs: int | None = None
    recipe: str | None = None
    amp: str | None = None

    def __post_init__(self) -> None:
        """Check types and ranges; LedgerError names the field, what it allows and the value."""
        for spec in fields(self):
            value = getattr(self, spec.name)
            allowed = _TYPES[str(spec.type)]
            if not isinstance(value, allowed) or isinstance(value, bool):
                names = " or ".join("null" if kind is _NONE else kind.__name__ for kind in allowed)
                raise LedgerError(f"{spec.name}: expected {names}, got {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise LedgerError(f"{spec.name}: expected a finite number, got {value!r}")
        if self.kind not in KINDS:
            raise LedgerError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        _check_range(self, ("top1_last", "top1_dynamic", "top1_whole"), 100.0)
        _check_range(self, ("open_ratio", "pruning_rate", "agreement"), 1.0)
        _check_range(self, ("polar",), 0.25)
        _check_range(self, ("seed", "macs", "macs_dense", "epochs", "wall_s", "energy_j", "energy_j_image"), math.inf)
        _check_range(self, ("macs_conv", "macs_conv_dense", "train_macs", "jobs"), math.inf)
        if self.macs_dense == 0:
            raise LedgerError(f"macs_dense: expected more than 0, got {self.macs_dense!r}")
        for field in ("experiment", "dataset"):
            if not getattr(self, field) or "/" in getattr(self, field):
                raise LedgerError(f"{field}: expected a name, not a path, got {getattr(self, field)!r}")

    @property
    def key(self) -> tuple[str, int]:
        """What a row is found by: a run is finished once."""
        return self.experiment, self.seed


def _check_range(row: LedgerRow, names: tuple[str, ...], high: float) -> None:
    for name in names:
        value = getattr(row, name)
        if value is not None and not 0 <= value <= high * (1 + 1e-6):
            bound = f"at most {high:g}" if high < math.inf else "at least 0"
            raise LedgerError(f"{name}: expected {bound}, got {value!r}")


def read_ledger(path: Path) -> dict[tuple[str, int], LedgerRow]:
    """Every row by (experiment, seed), in the file's order; empty where there is no file. Blank lines do not count.

    Raises:
        LedgerError: a line is damaged or stands for a run that an earlier line has; names file and line.
        OSError: the file cannot be read.
    """
    if not path.exists():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise LedgerError(f"{path}: expected UTF-8 text, found a damaged or different file ({error})") from None
    rows: dict[tuple[str, int], LedgerRow] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        row = _parse(line, where)
        if row.key in rows:
            raise LedgerError(f"{where}: a second row of {row.experiment}, seed {row.seed}; remove one of them")
        rows[row.key] = row
    return rows


def append_row(path: Path, row: LedgerRow) -> None:
    """Add a row. The file is whole at every moment, and processes that append at once wait for each other.

    Raises:
        LedgerError: the ledger is damaged, or has a row of this run already.
        OSError: it cannot be written; what stood there is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        rows = read_ledger(path)
        if row.key in rows:
            raise LedgerError(f"{path}: has a row of {row.experiment}, seed {row.seed} already")
        _write(path, (*rows.values(), row))


def amend_row(path: Path, key: tuple[str, int], **changes: Any) -> None:
    """Put what was measured later into the row of a run; otherwise as `append_row`.

    Raises:
        LedgerError: the ledger is damaged or has no such row, or a value does not belong there.
        OSError: it cannot be written; what stood there is kept.
    """
    with _locked(path.parent):
        rows = read_ledger(path)
        if key not in rows:
            raise LedgerError(f"{path}: has no row of {key[0]}, seed {key[1]}")
        _write(path, [replace(each, **changes) if each.key == key else each for each in rows.values()])


def _write(path: Path, rows: Iterable[LedgerRow]) -> None:
    text = "".join(json.dumps(asdict(row), sort_keys=True) + "\n" for row in rows)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: could not be written ({error.strerror or error}); what was there is kept") from None


def _parse(line: str, where: str) -> LedgerRow:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise LedgerError(f"{where}: damaged: expected a JSON object ({error})") from None
    if not isinstance(record, dict):
        raise LedgerError(f"{where}: expected a JSON object, found {type(record).__name__}")
    known = {spec.name for spec in fields(LedgerRow)}
    unknown = sorted(record.keys() - known)
    if unknown:
        raise LedgerError(f"{where}: unknown field {unknown[0]!r}")
    try:
        return LedgerRow(**record)
    except TypeError as error:  # a field without a default is missing
        raise LedgerError(f"{where}: {str(error).partition(') ')[2] or error}") from None
    except LedgerError as error:
        raise LedgerError(f"{where}: {error}") from None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder against other processes that append; the lock goes with the process, however it ends."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
