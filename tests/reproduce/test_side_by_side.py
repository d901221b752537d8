"""Runs in processes of their own: what one that fails takes along, and what it is called by."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from reproduce import runner
from reproduce.workplace import Workplace

GATED, CONTROL = ("table4-c10-r110-layer", 0), ("table4-c10-r110-layer-fixed-at-init", 0)
OTHER = ("headline-r56-c10", 0)


def ending(codes: dict[runner.Key, int], started: list[runner.Key]) -> object:
    def start(workplace: Workplace, key: runner.Key) -> subprocess.Popen[bytes]:
        started.append(key)
        return subprocess.Popen([sys.executable, "-S", "-c", f"raise SystemExit({codes.get(key, 0)})"])

    return start


@pytest.mark.parametrize(
    ("codes", "code", "failed"),
    [({}, 0, []), ({GATED: 2}, 0, [GATED, CONTROL]), ({GATED: 3}, 3, []), ({GATED: 3, OTHER: 2}, 3, [OTHER])],
)
def test_a_run_that_fails_takes_along_only_what_is_made_from_it(
    codes: dict[runner.Key, int], code: int, failed: list[runner.Key], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[runner.Key] = []
    failures = runner.Failures()
    monkeypatch.setattr(runner, "_start", ending(codes, started))
    workplace = Workplace(tmp_path / "runs", tmp_path / "results", {})
    assert runner._side_by_side(workplace, [GATED, CONTROL, OTHER], 1, failures) == code
    assert list(failures) == failed
    assert started == [GATED, *([] if GATED in codes else [CONTROL]), OTHER]


def test_sigterm_reaches_every_process_and_starts_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One leaves with a checkpoint, one has not come to where it could; neither has failed."""
    patient = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(3)); print(1, flush=True)"
    patient += "; time.sleep(60)"
    programs = {GATED: patient, OTHER: "import time; time.sleep(60)"}
    started: list[subprocess.Popen[bytes]] = []

    def start(workplace: Workplace, key: runner.Key) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-S", "-c", programs[key]], stdout=subprocess.PIPE))
        if len(started) == 2:
            assert started[0].stdout is not None and started[0].stdout.readline() == b"1\n"
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return started[-1]

    monkeypatch.setattr(runner, "_start", start)
    workplace = Workplace(tmp_path / "runs", tmp_path / "results", {})
    assert runner.run_experiments(workplace, [GATED, OTHER, CONTROL], 2) == runner.TIME_LIMIT
    assert [process.returncode for process in started] == [3, -signal.SIGTERM]
    assert capsys.readouterr().err == ""


def test_the_command_is_that_of_the_bench(tmp_path: Path) -> None:
    program = "import sys; print(sys.argv[1:3])"
    workplace = Workplace(tmp_path / "runs", tmp_path / "results", {}, command=(sys.executable, "-S", "-c", program))
    assert runner._start(workplace, OTHER).wait() == 0
    assert (tmp_path / "runs" / "headline-r56-c10-seed0.log").read_text() == "['run', 'headline-r56-c10']\n"


def test_a_failure_is_reported_by_the_log_of_this_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The log is that of all starts; one that is killed writes nothing of its own."""
    runs = tmp_path / "runs"
    runs.mkdir()
    log = runs / "headline-r56-c10-seed0.log"
    log.write_text("headline-r56-c10 seed 0: failed: no such images\n")
    for program, told in (("import os; os.kill(os.getpid(), 9)", "no output"), ("print('ended')", "")):
        failures = runner.Failures()
        workplace = Workplace(runs, tmp_path / "results", {}, command=(sys.executable, "-S", "-c", program))
        runner._side_by_side(workplace, [OTHER], 1, failures)
        assert [words.partition(" (")[0] for words in failures.values()] == [told] * bool(told)
    assert log.read_text().splitlines()[0].endswith("no such images")


def test_the_queue_is_looked_at_when_a_process_may_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not five times a second: of hundreds of runs that is work."""
    looks: list[runner.Key] = []
    blocked = runner._blocked
    monkeypatch.setattr(runner, "_blocked", lambda key, *rest: looks.append(key) or blocked(key, *rest))
    program = "import time; time.sleep(1.5)"
    workplace = Workplace(tmp_path / "runs", tmp_path / "results", {}, command=(sys.executable, "-S", "-c", program))
    assert runner._side_by_side(workplace, [GATED, CONTROL, OTHER], 2, runner.Failures()) == runner.DONE
    assert looks[:3] == [GATED, CONTROL, OTHER] and len(looks) <= 6
