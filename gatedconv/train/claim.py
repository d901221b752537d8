"""One process at a time trains a run: its folder is locked meanwhile."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from gatedconv.train.checkpoint import naming_file

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing is locked
    fcntl = None  # type: ignore[assignment]

_held: dict[tuple[Path, int], int] = {}  # the folder and the thread that holds it: the open folder


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a run's folder against other processes; who holds it already may claim it again.

    The folder itself is locked (flock): the lock goes with the process, however it ends, and there is no file that
    could stay behind or be copied along. Systems without flock, and file systems that lock no folders, have no lock.

    Args:
        folder: of the run; made where it is missing, and gone again where nothing was put into it.

    Raises:
        ValueError: another process, or another thread of this one, holds it.
        OSError: it cannot be made.
    """
    key = folder.resolve(), threading.get_ident()
    if fcntl is None or key in _held:
        yield
        return
    made = not folder.exists()
    _held[key] = _locked(folder)
    try:
        yield
    finally:
        handle = _held.pop(key, None)
        if handle is not None:  # a forked process has let go of it
            if made:
                with contextlib.suppress(OSError):  # something was put into it
                    folder.rmdir()
            os.close(handle)


def _locked(folder: Path) -> int:
    while True:
        with naming_file(folder):
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise ValueError(f"{folder}: another process trains this run; wait until it has ended, or end it") from None
        except OSError:  # the file system locks no folders
            return handle
        with contextlib.suppress(FileNotFoundError):  # it may have gone, and come again, since it was opened
            if os.path.samestat(os.fstat(handle), os.stat(folder)):
                return handle
        os.close(handle)


def _let_go() -> None:
    """A forked process, such as one that decodes images, shares the open folder: it would hold it to its own end."""
    for handle in _held.values():
        os.close(handle)
    _held.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_let_go)
