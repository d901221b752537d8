"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_atomic(path: Path, content: bytes, *, previous: Path | None = None) -> None:
    """Write to a temporary file beside ``path``, flush it to the disk, rename it.

    Args:
        path: the file; missing folders are made.
        content: all of it.
        previous: where what stood at ``path`` is moved just before; None to replace it.

    Raises:
        OSError: the disk is full or not writable, the file named; what stood at ``path`` is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = error.strerror or str(error)
        raise OSError(f"{path}: could not be written ({reason}); what was there before is kept") from None
    _sync_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed while they wrote have left in a folder and those inside it.

    Of processes of this machine that still run, the unfinished files stay.
    """
    for file in [*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")]:
        writer = file.name.split(".")[-2]
        if writer.isdecimal() and not _runs(int(writer)):
            with contextlib.suppress(OSError):
                file.unlink()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return process != os.getpid()


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder durable, where the system lets a folder be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    with contextlib.suppress(OSError):  # some file systems refuse; the rename itself has happened
        os.fsync(handle)
    os.close(handle)
