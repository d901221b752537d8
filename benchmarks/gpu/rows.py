"""Rows that come from several ledgers, and what calls of training brought back for ``results/``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.gpu.packs import Piece, find_packs, read_packs
from gatedconv._io import write_atomic
from reproduce.files import Key, stem
from reproduce.ledger import LedgerError, LedgerRow, amend_row, append_row, read_ledger

Rows = Mapping[Key, LedgerRow]
LEDGER = "results/ledger.jsonl"
LATER = "energy_j_image"  # the one figure that may be measured after the row was written


def beside_ledger(key: Key) -> tuple[str, str]:
    """What is kept of a run below the ledger's folder: every epoch's metrics, and what gates agreed on."""
    return f"epochs/{stem(key)}.jsonl", f"consensus/{stem(key)}.json"


def joined(ledgers: Iterable[tuple[str, Rows]]) -> dict[Key, LedgerRow]:
    """The rows of several ledgers, which are named by where they are from.

    Raises:
        LedgerError: two have different rows of one run; names run, ledgers, and the first field that differs.
    """
    rows: dict[Key, LedgerRow] = {}
    origin: dict[Key, str] = {}
    for where, ledger in ledgers:
        for key, row in ledger.items():
            if key in rows:
                row = _one_of(rows[key], row, f"{key[0]}, seed {key[1]}: {where} has another row than {origin[key]}")
            rows[key] = row
            origin.setdefault(key, where)
    return rows


def _one_of(mine: LedgerRow, theirs: LedgerRow, where: str) -> LedgerRow:
    """The row that both are, with what is measured later from whichever has it."""
    later = {LATER: getattr(theirs if getattr(mine, LATER) is None else mine, LATER)}
    if getattr(theirs, LATER) is None:
        theirs = replace(theirs, **later)
    mine = replace(mine, **later)
    for field, value in asdict(mine).items():
        other = getattr(theirs, field)
        if value != other:
            raise LedgerError(f"{where}: {field} is {other!r} and {value!r}; remove one of them")
    return mine


def rows_of(pieces: Mapping[str, Piece], scratch: Path) -> dict[Key, LedgerRow]:
    """The ledger among the files of archives, read by way of a file in ``scratch``."""
    path = scratch / "ledger.jsonl"
    path.write_bytes(pieces[LEDGER].content if LEDGER in pieces else b"")
    return read_ledger(path)


def ledger_text(rows: Iterable[LedgerRow]) -> bytes:
    """Rows as they stand in a ledger."""
    return "".join(json.dumps(asdict(row), sort_keys=True) + "\n" for row in rows).encode()


def merge(places: Sequence[Path], results: Path) -> list[str]:
    """Take over rows, epochs and consensus; returns a line for each row, and for what is missing.

    Raises:
        ValueError: archives are missing or damaged, or tell something else of a run than is there; nothing is written.
        OSError: a file cannot be written.
    """
    ledger = results / "ledger.jsonl"
    ledgers, files, lines = [(str(ledger), read_ledger(ledger))], dict[Path, bytes](), list[str]()
    with tempfile.TemporaryDirectory() as scratch:
        for packs in find_packs(places):
            pieces, notes = read_packs(packs)
            lines += notes
            ledgers.append((str(packs[0].parent), rows_of(pieces, Path(scratch))))
            rows = joined(ledgers)
            for key in ledgers[-1][1]:
                _take(pieces, key, results, files)
    for path, content in files.items():  # before the rows: no row without its epochs
        if not path.is_file():
            write_atomic(path, content)
    for key, row in rows.items():
        before = ledgers[0][1].get(key)
        if before is None:
            append_row(ledger, row)
            lines.append(f"{key[0]} seed {key[1]}: added, top-1 {row.top1_last:.2f}")
        elif before != row:
            amend_row(ledger, key, **{LATER: getattr(row, LATER)})
            lines.append(f"{key[0]} seed {key[1]}: joules of an image added")
    return lines


def _take(pieces: dict[str, Piece], key: Key, results: Path, files: dict[Path, bytes]) -> None:
    """Note a run's files under where they go; ValueError where others are there."""
    for place in beside_ledger(key):
        path, name = results / place, f"results/{place}"
        if name in pieces:
            there = files.get(path) or (path.read_bytes() if path.is_file() else None)
            if there is not None and there != pieces[name].content:
                raise ValueError(f"{path}: another run than that of the archives; move one of them away")
            files[path] = pieces[name].content
