"""Atomic writes, JSON lines and locks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gatedconv._io import first_line, locked, naming_file, write_atomic, write_json_lines


def test_json_lines_are_one_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.jsonl"
    write_json_lines(path, [{"b": 1, "a": 2.5}, {"a": None}], sort_keys=True)
    assert path.read_text() == '{"a": 2.5, "b": 1}\n{"a": null}\n'


def test_a_failed_write_keeps_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "a", b"one")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"a: could not be written \(No space left on device\); what was there before"):
        write_atomic(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"one" and len(list(tmp_path.iterdir())) == 1


def test_threads_that_write_one_file_do_not_mix(tmp_path: Path) -> None:
    path, contents = tmp_path / "a.bin", [bytes([letter]) * 200_000 for letter in b"abcd"]
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda content: write_atomic(path, content), contents * 8):
            pass
    assert path.read_bytes() in contents and os.listdir(tmp_path) == ["a.bin"]


def test_naming_file_names_the_file() -> None:
    with pytest.raises(OSError, match=r"^here: could not be written \(Is a directory\)$"):
        with naming_file(Path("here")):
            open("/", "w")


def test_a_lock_is_held_against_threads_and_processes(tmp_path: Path) -> None:
    path, messages = tmp_path / "new" / ".lock", list[str]()

    def attempt() -> None:
        try:
            with locked(path, held="taken"):
                messages.append("free")
        except ValueError as error:
            messages.append(str(error))

    with locked(path):
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
        code = "import sys; from pathlib import Path; from gatedconv._io import locked\n"
        code += f"with locked(Path({str(path)!r}), held='taken elsewhere'): pass"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 1 and "ValueError: taken elsewhere" in done.stderr
    attempt()
    assert messages == ["taken", "free"]


def test_a_lock_that_is_held_is_waited_for(tmp_path: Path) -> None:
    order, waiting = list[str](), threading.Event()

    def second() -> None:
        waiting.set()
        with locked(tmp_path / ".lock"):
            order.append("second")

    thread = threading.Thread(target=second)
    with locked(tmp_path / ".lock"):
        thread.start()
        waiting.wait()
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("\none: two\nthree"), "one: two"), (RuntimeError(""), "RuntimeError"), (OSError(), "OSError")],
)
def test_the_first_line_of_an_error(error: Exception, line: str) -> None:
    assert first_line(error) == line
