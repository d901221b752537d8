"""The ledger of results: one JSON line per finished run, checked when it is read and when it is written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gatedconv._io import locked, write_json_lines

KINDS = ("gated", "dense", "equal_macs", "fixed_at_init", "taught_before", "naive_dropout", "naive_layer")
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
_PERCENTS = ("top1_last", "top1_dynamic", "top1_teacher")
_SHARES = ("open_ratio", "pruning_rate", "agreement")
_AMOUNTS = (
    "seed",
    "macs",
    "macs_dense",
    "epochs",
    "wall_s",
    "energy_j",
    "energy_j_image",
    "macs_conv",
    "macs_conv_dense",
    "train_macs",
    "core_minutes",
    "jobs",
)


@dataclass(frozen=True)
class LedgerRow:
    """A finished run.

    Attributes:
        experiment: name in the experiment table.
        seed: of the run.
        dataset: name of the images; of a file its name, without its folder.
        model: network.
        kind: one of `KINDS`.
        top1_last: percent, of the network that would be deployed, after the last epoch.
        macs: of that network, per image (fvcore's count).
        macs_dense: of the same network without gates.
        epochs: passes over the train split, before and after the consensus.
        device: that it ran on.
        commit: of the source, with "+changes" where files differed from it; None where unknown.
        versions: of Python and packages.
        wall_s: seconds of training and finishing.
        evaluated_on: "test", or "val" for design choices.
        open_ratio: share of gates that are open in the consensus; None without gates.
        pruning_rate: eq. 11, share of parameters removed; None without gates.
        polar: polarization (eqs. 6-8) over the train split at the consensus.
        agreement: share of the samples' decisions that equal the consensus, 0 to 1.
        top1_dynamic: percent, before the freeze, with gates deciding per sample.
        macs_dynamic: expected MACs of the same.
        top1_teacher: percent, of the dense teacher after the last epoch; None without a teacher.
        train_macs: multiply-accumulates of the training, the teacher's included; None if unknown.
        core_minutes: of CPU cores in the training; None in rows older than the field.
        params: parameters of the deployed network.
        energy_j: joules of the training; None where the machine has no counter.
        energy_j_image: joules per image of the deployed network; None where not measured.
        energy_reason: why `energy_j` is None; None where it is not, and in rows older than the field.
        macs_conv: the part of `macs` in convolutions and linear layers, as most papers count; None if unknown.
        macs_conv_dense: the same part of `macs_dense`.
        jobs: runs that shared the device when this one ended; None in rows older than the field.
        recipe: short hash of the recipe; None in rows older than the field.
        amp: mixed precision in effect, off, bf16 or fp16; None in rows older than the field.

    Raises:
        ValueError: a field has the wrong type or is out of range.
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
    top1_teacher: float | None = None
    train_macs: float | None = None
    core_minutes: float | None = None
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
        """Check types and ranges; the error names the field, what it allows and the value."""
        for spec in fields(self):
            value, allowed = getattr(self, spec.name), _TYPES[str(spec.type)]
            if not isinstance(value, allowed) or isinstance(value, bool):
                names = " or ".join("null" if kind is _NONE else kind.__name__ for kind in allowed)
                raise ValueError(f"{spec.name}: expected {names}, got {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{spec.name}: expected a finite number, got {value!r}")
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        for group, high in ((_PERCENTS, 100.0), (_SHARES, 1.0), (("polar",), 0.25), (_AMOUNTS, math.inf)):
            _check_range(self, group, high)
        if self.macs_dense == 0:
            raise ValueError(f"macs_dense: expected more than 0, got {self.macs_dense!r}")
        for name in ("experiment", "dataset"):
            if not getattr(self, name) or "/" in getattr(self, name):
                raise ValueError(f"{name}: expected a name, not a path, got {getattr(self, name)!r}")

    @property
    def key(self) -> tuple[str, int]:
        """Experiment and seed; a ledger has one row of each."""
        return self.experiment, self.seed


def _check_range(row: LedgerRow, names: tuple[str, ...], high: float) -> None:
    for name in names:
        value = getattr(row, name)
        if value is not None and not 0 <= value <= high * (1 + 1e-6):
            bound = f"at most {high:g}" if high < math.inf else "at least 0"
            raise ValueError(f"{name}: expected {bound}, got {value!r}")


Rows = dict[tuple[str, int], LedgerRow]


def read_ledger(path: Path) -> Rows:
    """Every row by (experiment, seed), in file order; empty where there is no file.

    Raises:
        ValueError: a line is damaged, or repeats the run of an earlier line; names file and line.
        OSError: the file cannot be read.
    """
    rows: Rows = {}
    for where, record in read_json_lines(path) if path.exists() else ():
        row = _parse(record, where)
        if row.key in rows:
            raise ValueError(f"{where}: a second row of {row.experiment}, seed {row.seed}; remove one of them")
        rows[row.key] = row
    return rows


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place ("PATH: line N") and the value of every line that is not blank.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8 text, or a line is not JSON; names file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, found a damaged or different file ({error})") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}: line {number}"
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is damaged, expected JSON ({error})") from None
            yield where, value


def append_row(path: Path, row: LedgerRow) -> None:
    """Add a row, atomically; processes that append at the same time wait for each other.

    Raises:
        ValueError: the ledger is damaged, or has a row of this run.
        OSError: it cannot be written; its present content is kept.
    """
    with _locked(path):
        rows = read_ledger(path)
        if row.key in rows:
            raise ValueError(f"{path}: has a row of {row.experiment}, seed {row.seed} already")
        _write(path, {**rows, row.key: row})


def _locked(path: Path) -> Any:
    return locked(path.with_name(f".{path.name}.lock"))


def _write(path: Path, rows: Rows) -> None:
    write_json_lines(path, [asdict(row) for row in rows.values()], sort_keys=True)


def _parse(record: Any, where: str) -> LedgerRow:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(record).__name__}")
    unknown = sorted(record.keys() - {spec.name for spec in fields(LedgerRow)})
    if unknown:
        raise ValueError(f"{where}: unknown field {unknown[0]!r}")
    try:
        return LedgerRow(**record)
    except TypeError as error:  # a field without a default is missing
        raise ValueError(f"{where}: {str(error).partition(') ')[2] or error}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
