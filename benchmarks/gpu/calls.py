"""One call of training: what earlier calls left, runs for some minutes, archives for the next call.

Runs live in a work folder, archives in another one, which alone is brought back. They are written every minute and at
the end, however it comes. Runs see their images under a name that is the same on every machine, so that a run can go on
on another one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from benchmarks.gpu.keep import epochs_done, groups, unpacked
from benchmarks.gpu.packs import Limits, find_packs, read_packs, write_packs
from benchmarks.gpu.rows import LEDGER, Rows, joined, ledger_text, rows_of
from benchmarks.gpu.session import ROOT
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.watch import end
from gatedconv._io import write_atomic
from gatedconv.environment import commit
from gatedconv.train.config import epoch_range
from gatedconv.train.folder import RunFolder
from reproduce.files import Bench, Key, stem
from reproduce.ledger import read_ledger
from reproduce.runner import run_experiments

LIMITS = Limits()
FINISHING_S = 75.0  # beyond MINUTES, for runs that are being measured, and for archives
PACK_EVERY_S = 60.0
ENDED = 124
_SELF = (sys.executable, "-m", "benchmarks.gpu.experiments")


def call(settings: Settings, results: Path = ROOT / "results") -> int:
    """Go on with what is there, run, and pack; the exit code.

    Args:
        settings: of the call.
        results: folder of the ledger that is known already.

    Raises:
        ValueError: ledgers that contradict each other, archives that cannot be read, no such device.
        OSError: a folder cannot be written.
    """
    started = time.monotonic()
    _require_device(settings.device)
    if commit() is None:
        print("no .git here: set GATEDCONV_COMMIT, or the ledger cannot tell the commit")
    committed = read_ledger(results / "ledger.jsonl")
    settings.work.mkdir(parents=True, exist_ok=True)
    _go_on_from(settings, committed, results)
    _link_data(settings)
    packer = _Packer(settings, committed)
    code = ENDED
    with _sigterm_leaves():
        try:
            code = _watched(packer, started + 60 * settings.minutes + FINISHING_S)
        finally:
            packer.pack()
            _tell(settings, packer, code)
    return 3 if code == ENDED else code


def work(settings: Settings) -> int:
    """Be the process that trains, in the work folder, and so the processes that it starts."""
    os.chdir(settings.work)
    sources = {name: f"npz:data/{name}.npz" if _is_archive(source) else source for name, source in _sources(settings)}
    deadline = time.monotonic() + 60 * float(os.environ["GATEDCONV_MINUTES_LEFT"])
    bench = Bench(
        Path("runs"), Path("results"), sources, settings.device, deadline=deadline, amp=settings.amp,
        cuda_graph=settings.cuda_graph, command=(*_SELF, "--child"),
    )  # fmt: skip
    return run_experiments(bench, settings.keys, settings.jobs)


def _sources(settings: Settings) -> list[tuple[str, str]]:
    return sorted(settings.sources.items())


def _is_archive(source: str) -> bool:
    return source.startswith("npz:")


def _require_device(device: str) -> None:
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("no CUDA device is visible (DEVICE=cpu does without)")


def _go_on_from(settings: Settings, committed: Rows, results: Path) -> None:
    """Put the files of earlier calls into the work folder, with a ledger of all rows that are known."""
    own = settings.work / LEDGER
    ledgers = [(str(results / "ledger.jsonl"), committed), (str(own), read_ledger(own))]
    # What lies in OUT is about to be replaced; whoever forgets FROM loses nothing by it.
    forgotten = [settings.out] if any(settings.out.glob("pack-*.tar")) else []
    for packs in find_packs([*settings.before, *forgotten]):
        pieces, notes = read_packs(packs)
        ledgers.append((str(packs[0].parent), rows_of(pieces, settings.work)))
        joined(ledgers)  # before anything of it is written
        unpacked(settings.work, pieces.values())
        for note in notes:
            print(note)
    for path in (results / "consensus").glob("*.json"):  # of runs whose controls may come now
        write_atomic(settings.work / "results" / "consensus" / path.name, path.read_bytes())
    write_atomic(own, ledger_text(joined(ledgers).values()))


def _link_data(settings: Settings) -> None:
    folder = settings.work / "data"
    folder.mkdir(exist_ok=True)
    for name, source in _sources(settings):
        if _is_archive(source):
            link = folder / f"{name}.npz"
            link.unlink(missing_ok=True)
            link.symlink_to(source.removeprefix("npz:"))


class _Packer:
    """Writes the archives, again only where something has changed.

    Attributes:
        left_out: names of runs without room, and their bytes.
    """

    def __init__(self, settings: Settings, committed: Rows) -> None:
        self.settings, self.committed = settings, committed
        self.left_out: dict[str, int] = {}
        self._seen: object = None

    def pack(self) -> None:
        """Write what there is now."""
        found = list(groups(self.settings.work, self.committed))
        state = [(piece.name, piece.changed, len(piece.content)) for group in found for piece in group.pieces]
        if state != self._seen:
            left = write_packs(self.settings.out, found, LIMITS, self.settings.work)
            self.left_out, self._seen = {each.label: each.size for each in left}, state


def _watched(packer: _Packer, kill_at: float) -> int:
    """The exit code of the process that trains, or `ENDED` where it had to be ended."""
    settings = packer.settings
    for log in (settings.work / "runs").glob("*.log"):
        log.unlink()
    folders = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    paths = [str(ROOT), *(str(Path(folder).absolute()) for folder in folders)]  # the work folder is another one
    left = (kill_at - FINISHING_S - time.monotonic()) / 60
    told = {"PYTHONPATH": os.pathsep.join(paths), "GATEDCONV_MINUTES_LEFT": f"{max(0.01, left):.3f}"}
    sys.stdout.flush()
    command = [*_SELF, "--worker"]
    process = subprocess.Popen(command, env=os.environ | told, start_new_session=True)
    try:
        while True:
            try:
                return process.wait(max(0.0, min(PACK_EVERY_S, kill_at - time.monotonic())))
            except subprocess.TimeoutExpired:
                if time.monotonic() >= kill_at:
                    return ENDED
                packer.pack()
    finally:
        end(process)


@contextmanager
def _sigterm_leaves() -> Iterator[None]:
    """While it lasts, SIGTERM raises SystemExit, so that archives are written on the way out."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell(settings: Settings, packer: _Packer, code: int) -> None:
    """Say what has become of every run that was asked for, and what does not come back."""
    rows = read_ledger(settings.work / LEDGER)
    for key in settings.keys:
        print(f"{key[0]} seed {key[1]}: {_state(settings.work, key, rows)}")
    for label, size in packer.left_out.items():
        megabytes = f"{size / 1e6:.1f} MB"
        print(f"{label}: {megabytes} have no room in {settings.out} and do NOT come back (fewer JOBS need less)")
    packs = sorted(settings.out.glob("pack-*.tar"))
    size = sum(path.stat().st_size for path in packs)
    print(f"{len(packs)} archives in {settings.out}, {size / 1e6:.1f} MB: FROM of the next call")
    words = {0: "nothing is left", 1: "something failed", 3: "time is up: call again", ENDED: "time is up: call again"}
    print(words.get(code, f"failed with exit code {code}"), flush=True)


def _state(work: Path, key: Key, rows: Rows) -> str:
    if key in rows:
        return "done"
    folder = RunFolder(work / "runs" / stem(key))
    log = folder.path.with_name(f"{stem(key)}.log")
    last = (log.read_text(errors="replace").split("\n") if log.is_file() else [])[-2:-1]
    told = f" ({last[0].strip()})" if last and last[0].strip() else ""
    if not folder.config.is_file():
        return f"not begun{told}"
    config = folder.read_config()
    return f"{epochs_done(folder)} of {epoch_range(config, 'dense')[1]} epochs{told}"
