"""Atomic writes, JSON lines, schema checks, locks, silence, and the first line of an error."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock

Schema = type | tuple[type, ...] | Mapping[str, Any]
"""A type, several types, or a mapping of keys to schemas; a key that ends in "?" may be absent."""

NUMBER = (int, float)


def write_atomic(path: Path, content: bytes, *, previous: Path | None = None) -> None:
    """Write a file completely or not at all: to a temporary file in the same folder, which is then renamed.

    Args:
        path: the file; missing folders are made.
        content: all of it.
        previous: where the present file is moved just before; None replaces it.

    Raises:
        OSError: the disk is full or not writable; names the file, whose present content is kept.
    """
    temporary = path.with_name(f".{path.name}.{threading.get_ident()}.{os.getpid()}.tmp")
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


@contextlib.contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Make write errors name the file and the reason."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path}: could not be written ({error.strerror or error})") from None


def write_json_lines(path: Path, records: Iterable[Mapping[str, Any]], *, sort_keys: bool = False) -> None:
    """Write one JSON object per line, atomically; raises as `write_atomic`."""
    write_atomic(path, "".join(json.dumps(record, sort_keys=sort_keys) + "\n" for record in records).encode())


def require_schema(value: Any, schema: Schema, where: str, error: type[ValueError] = ValueError) -> None:
    """Check a value read from a file against a schema; unknown keys are allowed.

    Args:
        value: what was read.
        schema: what it has to be.
        where: names the file, and the place in it.
        error: the class of error to raise.

    Raises:
        ValueError: `error`, naming the place, what was expected and what was found.
    """
    kinds = (dict,) if isinstance(schema, Mapping) else schema if isinstance(schema, tuple) else (schema,)
    fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    if not fits:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise error(f"{where}: expected {names}, found {type(value).__name__}")
    if isinstance(schema, Mapping):
        for key, inner in schema.items():
            name = key.removesuffix("?")
            if name in value:
                require_schema(value[name], inner, f"{where}: {name}", error)
            elif name == key:
                raise error(f"{where}: missing key {name!r}")


@contextlib.contextmanager
def locked(path: Path, *, held: str | None = None) -> Iterator[None]:
    """Hold a lock file against other processes, and against other threads of this one.

    The operating system releases the lock when the process ends, however that happens; the empty file stays. A
    thread that holds the lock may take it again.

    Args:
        path: the lock file; missing folders are made.
        held: message of the error where another process holds the lock; None waits for that process.

    Raises:
        ValueError: another process holds the lock, and ``held`` is given.
        OSError: the file cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path, is_singleton=True)
    try:
        lock.acquire(timeout=-1 if held is None else 0)
    except filelock.Timeout:
        raise ValueError(held) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Drop what exporters and compilers print and log (graphs, stacks); their exceptions contain the reason."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            yield
    finally:
        logging.disable(before)


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a locked folder and in the folders inside it."""
    for file in [*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")]:
        if file.name.split(".")[-2].isdecimal():
            with contextlib.suppress(OSError):
                file.unlink()


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder durable, where the system lets a folder be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    with contextlib.suppress(OSError):  # some file systems refuse; the rename itself has happened
        os.fsync(handle)
    os.close(handle)
