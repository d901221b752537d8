"""Which files of a work folder the next call needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.gpu.packs import Group, Piece, put_back, read_piece
from benchmarks.gpu.rows import LEDGER, Rows, beside_ledger, ledger_text
from benchmarks.gpu.slim import AFTER, BEFORE, made_whole, slimmed
from gatedconv.train.checkpoint import previous_path
from gatedconv.train.folder import RunFolder
from reproduce.files import stem
from reproduce.ledger import read_ledger
from reproduce.table import all_experiments


def groups(work: Path, committed: Rows) -> Iterator[Group]:
    """What a work folder has to hand on, the most important first.

    Rows that are not among ``committed``, with their epochs and consensus; finished runs, with weights where others
    are made from them; then the newest checkpoints of those that are not finished, the furthest first.
    """
    rows = read_ledger(work / LEDGER)
    new = {key: row for key, row in rows.items() if row != committed.get(key)}
    found = [read_piece(work, f"results/{place}") for key in new for place in beside_ledger(key)]
    ledger = Piece(LEDGER, ledger_text(new.values()), 0.0)
    yield Group("rows of the ledger", [ledger, *(piece for piece in found if piece)])
    folders = [RunFolder(path) for path in sorted((work / "runs").glob("*-seed*")) if path.is_dir()]
    finished = [folder for folder in folders if folder.summary.is_file()]
    begun = [folder for folder in folders if not folder.summary.is_file() and folder.holds_checkpoint()]
    for folder in finished:
        told = folder.config, folder.metrics, folder.summary, folder.consensus
        weights = [folder.model("dense")] if _weights_needed(folder.path.name, rows) else []
        yield _group(work, folder, [(path, path) for path in (*told, *weights)])
    for folder in sorted(begun, key=lambda folder: -epochs_done(folder)):
        told = folder.config, folder.metrics, folder.consensus
        group = _group(work, folder, [*((path, path) for path in told), *_checkpoints(folder)])
        yield Group(group.label, [_slimmed(work, folder, piece, group.pieces) for piece in group.pieces])


def epochs_done(folder: RunFolder) -> int:
    """Epochs in metrics.jsonl, of all trainings of a run."""
    return folder.metrics.read_bytes().count(b"\n") if folder.metrics.is_file() else 0


def _checkpoints(folder: RunFolder) -> Iterator[tuple[Path, Path]]:
    """The newest checkpoint of each training, and where it lies: the moment between two renames is short, but there."""
    files = [path for path in folder.checkpoint("any").parent.glob("*.pt") if not path.name.startswith(".")]
    phases = {path.name.removesuffix(".pt").removesuffix(".previous") for path in files}
    for path in map(folder.checkpoint, sorted(phases)):
        yield path, path if path.is_file() else previous_path(path)


def _group(work: Path, folder: RunFolder, files: Iterable[tuple[Path, Path]]) -> Group:
    found = [read_piece(work, str(path.relative_to(work)), place) for path, place in files]
    return Group(folder.path.name, [piece for piece in found if piece])


def _slimmed(work: Path, folder: RunFolder, piece: Piece, pieces: list[Piece]) -> Piece:
    before, after = (str(folder.checkpoint(phase).relative_to(work)) for phase in (BEFORE, AFTER))
    if piece.name != before or after not in [each.name for each in pieces]:
        return piece
    return slimmed(piece, folder.checkpoint(BEFORE), work)


def unpacked(work: Path, pieces: Iterable[Piece]) -> None:
    """Put the files of archives into a work folder, as they were before they were packed."""
    put_back(work, [piece for piece in pieces if piece.name != LEDGER])
    for path in (work / "runs").glob("*-seed*"):
        if path.is_dir():
            made_whole(RunFolder(path))


def _weights_needed(name: str, rows: Rows) -> bool:
    """Whether a run that is not in the ledger yet is made from the weights of this one."""
    for each in all_experiments().values():
        left = [seed for seed in each.seeds if (each.name, seed) not in rows]
        if not each.trains and name in [stem((each.needs, seed)) for seed in left]:
            return True
    return False
