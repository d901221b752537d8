"""What a call of training leaves behind: a few archives with all that the next call needs, and nothing else.

An archive is a plain tar file of at most `Limits.file_bytes`; text in it is compressed, name by name (``.gz``). The
first one holds ``index.json``, which lists the files of all of them: what did not come back is noticed and named.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

NAME = "pack-{}.tar"
INDEX = "index.json"
_TEXT = (".jsonl", ".json", ".toml")
_TELLING = {"summary.json": 1, "metrics.jsonl": 2}  # how far a run is; the epochs last
_MEMBER_BYTES = 4096  # of a member's headers and padding, at most
_END_BYTES = tarfile.RECORDSIZE


@dataclass(frozen=True)
class Limits:
    """What a call may leave: bytes of an archive, archives, and bytes of all of them."""

    file_bytes: int = 16_000_000
    files: int = 7
    total_bytes: int = 61_500_000


class Piece(NamedTuple):
    """A file: its place below the work folder, its bytes, and when it was written (seconds since the epoch)."""

    name: str
    content: bytes
    changed: float


class Group(NamedTuple):
    """Files that are of use only together, and what people call them."""

    label: str
    pieces: list[Piece]


class LeftOut(NamedTuple):
    """A group that the limits have no room for."""

    label: str
    size: int


def read_piece(work: Path, name: str, place: Path | None = None) -> Piece | None:
    """The file ``name`` of the work folder, or the one at ``place`` under that name; None where there is none."""
    path = place or work / name
    try:
        return Piece(name, path.read_bytes(), path.stat().st_mtime)
    except FileNotFoundError:
        return None


def write_packs(out: Path, groups: Iterable[Group], limits: Limits, scratch: Path) -> list[LeftOut]:
    """Replace the archives in ``out`` by those of ``groups``, the most important of which come first.

    Args:
        out: folder that is brought back; nothing else in it is touched.
        groups: a group goes in whole or not at all.
        limits: of ``out``, the archives alone.
        scratch: a folder where archives are written before they are moved.

    Returns:
        The groups for which there is no room.
    """
    bins: list[list[Piece]] = [[]]
    left_out = []
    reserve = limits.file_bytes // 100  # of the first archive, for the index
    for group in groups:
        packed = [_packed(piece) for piece in group.pieces]
        trial = [list(each) for each in bins]
        if _place(packed, trial, limits, reserve):
            bins = trial
        else:
            left_out.append(LeftOut(group.label, sum(len(piece.content) for piece in packed)))
    names = [piece.name for pieces in bins for piece in pieces]
    index = {"files": names, "left_out": [each.label for each in left_out]}
    bins[0].insert(0, Piece(INDEX, json.dumps(index).encode(), 0.0))
    out.mkdir(parents=True, exist_ok=True)
    for number, pieces in reversed(list(enumerate(bins))):  # the index last: it never tells of what is not there yet
        partial = scratch / f".{NAME.format(number)}"
        partial.write_bytes(_archive(pieces))
        shutil.move(partial, out / NAME.format(number))
    for number in range(len(bins), limits.files):
        (out / NAME.format(number)).unlink(missing_ok=True)
    return left_out


def _place(pieces: Sequence[Piece], bins: list[list[Piece]], limits: Limits, reserve: int) -> bool:
    for piece in pieces:
        for number in range(len(bins) + 1):
            if number == len(bins):
                if number == limits.files:
                    return False
                bins.append([])
            room = limits.file_bytes - (reserve if number == 0 else 0)
            if _size([*bins[number], piece]) <= room:
                bins[number].append(piece)
                break
            if not bins[number] and number:  # not even alone
                return False
    return sum(map(_size, bins)) + reserve <= limits.total_bytes


def _size(pieces: Sequence[Piece]) -> int:
    return sum(len(piece.content) + _MEMBER_BYTES for piece in pieces) + _END_BYTES


def _packed(piece: Piece) -> Piece:
    if not piece.name.endswith(_TEXT):
        return piece
    return Piece(f"{piece.name}.gz", gzip.compress(piece.content, 6, mtime=0), piece.changed)


def _archive(pieces: Sequence[Piece]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for piece in pieces:
            member = tarfile.TarInfo(piece.name)
            member.size, member.mtime = len(piece.content), piece.changed
            archive.addfile(member, io.BytesIO(piece.content))
    return buffer.getvalue()


def find_packs(places: Iterable[Path]) -> list[list[Path]]:
    """The archives of earlier calls, a list for each call: those that lie in one folder, at whatever depth.

    Raises:
        ValueError: nothing there, or no archives.
    """
    calls: dict[Path, set[Path]] = {}
    for place in places:
        packs = [place] if place.is_file() else list(place.glob(f"**/{NAME.format('*')}"))
        if not place.exists():
            raise ValueError(f"{place}: expected a folder of archives or an archive, found nothing there")
        if not packs:
            raise ValueError(f"{place}: expected archives {NAME.format('*')}, found none")
        for pack in sorted(packs):
            calls.setdefault(pack.parent, set()).add(pack)
    return [sorted(packs) for packs in calls.values()]


def read_packs(paths: Sequence[Path]) -> tuple[dict[str, Piece], list[str]]:
    """The files of one call's archives by name, and a line for each thing that is missing.

    A run that lacks a file is not there at all: it would go on from something else than it was.

    Raises:
        ValueError: the archive with the index is missing or damaged, or a file in one would lie elsewhere.
    """
    pieces: dict[str, Piece] = {}
    notes = []
    for path in paths:
        try:
            pieces |= _read_archive(path)
        except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
            notes.append(f"{path}: a damaged archive ({error}); what it held is missing")
    if INDEX not in pieces:
        reasons = "; ".join(notes) or f"found {', '.join(path.name for path in paths)}"
        raise ValueError(f"{paths[0].parent}: expected {NAME.format(0)} with {INDEX}; {reasons}")
    index = json.loads(pieces.pop(INDEX).content)
    missing = sorted({_plain(name) for name in index["files"]} - pieces.keys())
    for folder in sorted({_folder(name) for name in missing}):
        gone = [name for name in missing if _folder(name) == folder]
        notes.append(f"{folder}: lacks {', '.join(PurePosixPath(name).name for name in gone)}, and is left out")
        pieces = {name: piece for name, piece in pieces.items() if _folder(name) != folder}
    notes += [f"{label}: had no room in the archives" for label in index["left_out"]]
    return pieces, notes


def _read_archive(path: Path) -> Mapping[str, Piece]:
    found = {}
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            file = archive.extractfile(member)
            first, *rest = PurePosixPath(member.name).parts
            if file is None or ".." in rest or not (first in ("runs", "results") and rest or member.name == INDEX):
                raise ValueError(f"{path}: expected files of runs and results, found {member.name!r}")
            content = file.read()
            name = _plain(member.name)
            found[name] = Piece(name, gzip.decompress(content) if name != member.name else content, member.mtime)
    return found


def _plain(name: str) -> str:
    return name.removesuffix(".gz")


def _folder(name: str) -> str:
    """Of a run's file runs/NAME; of any other its own name."""
    parts = PurePosixPath(name).parts
    return "/".join(parts[:2]) if parts[0] == "runs" else name


def put_back(work: Path, pieces: Iterable[Piece]) -> None:
    """Write files to the work folder, but for those that it has in a newer state.

    The files of a run go together: where the work folder's run is as far as this one, or further, none is written.
    """
    groups: dict[str, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(_folder(piece.name), []).append(piece)
    for name, theirs in groups.items():
        paths = [path for path in (work / name, *(work / name).rglob("*")) if path.is_file()]
        mine = [read_piece(work, str(path.relative_to(work))) for path in paths]
        if _standing(theirs) > _standing([piece for piece in mine if piece]):
            # That comes last: where writing is cut off, the next call does it again.
            for piece in sorted(theirs, key=_tells):
                _write(work / piece.name, piece)


def _tells(piece: Piece) -> int:
    return _TELLING.get(PurePosixPath(piece.name).name, 0)


def _standing(pieces: Sequence[Piece]) -> tuple[bool, int, float]:
    """How far a run is: whether it is finished, the epochs that it tells of, and when it last changed."""
    files = {PurePosixPath(piece.name).name: piece for piece in pieces}
    epochs = files["metrics.jsonl"].content.count(b"\n") if "metrics.jsonl" in files else 0
    return "summary.json" in files, epochs, max((piece.changed for piece in pieces), default=-math.inf)


def _write(path: Path, piece: Piece) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(piece.content)
    os.utime(partial, (piece.changed, piece.changed))
    os.replace(partial, path)
