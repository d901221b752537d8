"""Training runs in pieces, on a copy without history where nothing of gatedconv is installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import calls, preflight
from benchmarks.gpu.packs import Group, find_packs, read_packs
from benchmarks.gpu.rows import ledger_text, rows_of
from benchmarks.gpu.settings import Settings
from gatedconv.train.config import TrainConfig, to_toml
from reproduce.ledger import read_ledger
from reproduce.table import all_experiments
from tests.benchmarks.bare import Bare
from tests.reproduce.ledger_rows import row

KEY = ("tiny", 0)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Bare:
    return Bare(tmp_path_factory.mktemp("bare"))


def require_brought_back(out: Path) -> None:
    """As archives have to be: at most 8 files of 16 MiB, 64 MiB in all, two folders deep, plain names."""
    files = [path for path in out.rglob("*") if not path.is_dir()]
    assert 0 < len(files) <= 8 and sum(path.stat().st_size for path in files) <= 64 * 2**20
    for path in files:
        assert path.stat().st_size <= 16 * 2**20 and path.is_file() and not path.is_symlink()
        parts = path.relative_to(out).parts
        assert len(parts) <= 3 and all(re.fullmatch(r"[A-Za-z0-9._-]+", part) for part in parts)


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    """A row or an epoch but for what no two runs share, and what tells that others ran beside."""
    return {name: value for name, value in record.items() if name not in ("wall_s", "seconds", "jobs", "energy_reason")}


def rows_and_epochs(results: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    lines = (results / "epochs" / "tiny-seed0.jsonl").read_text().splitlines()
    kept = asdict(read_ledger(results / "ledger.jsonl")[KEY])
    return without_times(kept), [without_times(json.loads(line)) for line in lines]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_calls_make_the_row_of_an_uninterrupted_run(bare: Bare, tmp_path: Path) -> None:
    """The first call ends within the first epoch; the second one has nothing but its archives."""
    first, second = tmp_path / "first", tmp_path / "second"
    code, told = bare.call("experiments", EXPERIMENTS="tiny", SEEDS=0, MINUTES=1e-4, OUT=first, WORK=tmp_path / "work1")
    assert code == 3 and "tiny seed 0: 0 of 2 epochs" in told and told.endswith("time is up: call again\n"), told
    require_brought_back(first)
    names = "tiny tiny-dense tiny-fixed-at-init"
    settings: dict[str, object] = {"FROM": first, "OUT": second, "WORK": tmp_path / "work2", "MINUTES": 4, "JOBS": 2}
    code, told = bare.call("experiments", EXPERIMENTS=names, SEEDS=0, **settings)
    logs = "\n".join(path.read_text() for path in (tmp_path / "work2" / "runs").glob("*.log"))
    assert code == 0 and told.endswith("nothing is left\n") and told.count(": done\n") == 3, told + logs
    require_brought_back(second)
    results = tmp_path / "results"
    code, told = bare.call("merge", str(second), "--results", str(results))
    assert code == 0 and told.count("added, top-1") == 3, told
    whole = tmp_path / "whole"
    code, told = bare.call(
        "experiments", "--child", "report", "run", "tiny", "--seed", "0", "--runs", str(whole / "runs"),
        "--results", str(whole), "--device", "cpu", "--source", "blobs=npz:blobs.npz",
    )  # fmt: skip
    assert code == 0, told
    assert rows_and_epochs(results) == rows_and_epochs(whole)
    kept = (whole / "consensus" / "tiny-seed0.json").read_bytes()
    assert (results / "consensus" / "tiny-seed0.json").read_bytes() == kept
    kept_row = read_ledger(results / "ledger.jsonl")[KEY]
    assert kept_row.commit == "0123abc" and kept_row.macs < kept_row.macs_dense
    assert not any(str(tmp_path) in path.read_text() for path in results.rglob("*.json*"))


@pytest.mark.slow
def test_what_is_missing_is_told_before_anything_runs(bare: Bare, tmp_path: Path) -> None:
    absent = "import sys; sys.modules |= dict.fromkeys(('fvcore', 'iopath', 'tomli_w', 'triton'))"
    (tmp_path / "sitecustomize.py").write_text(absent)
    code, told = bare.call("experiments", packages=tmp_path, EXPERIMENTS="tiny", WORK=tmp_path / "work")
    assert code == 2 and len(told.splitlines()) == 1
    assert told.startswith("gpu: experiments: missing here: fvcore, iopath, tomli-w. Where nothing can be installed")
    assert "--wheel-dir wheels fvcore iopath tomli-w`" in told and "PYTHONPATH=packages" in told
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_a_run_imports_no_package_that_the_preflight_has_not(bare: Bare, tmp_path: Path) -> None:
    """Minutes into a run is too late to find that something is missing; exports alone are made where they can be."""
    script = f"""
import sys
from benchmarks.gpu.__main__ import prepare
prepare()
from benchmarks.gpu.preflight import require_all
require_all()
before = {{name.partition(".")[0] for name in sys.modules}}
from gatedconv.cli import main
import gatedconv.train.finish
gatedconv.train.finish._EXPORTS = {{}}
for name in ("tiny", "tiny-naive"):
    code = main(["report", "run", name, "--seed", "0", "--runs", {str(tmp_path / "runs")!r}, "--device", "cpu",
                 "--results", {str(tmp_path)!r}, "--source", "blobs=npz:blobs.npz"])
    assert code == 0
late = {{name.partition(".")[0] for name in sys.modules}} - before
places = {{name: getattr(sys.modules[name], "__file__", None) or "" for name in late if name in sys.modules}}
print("late:", sorted(name for name, place in places.items() if "site-packages" in place))
"""
    (bare.root / "benchmarks" / "gpu" / "imports.py").write_text(script)
    code, told = bare.call("imports")
    late = re.search(r"late: \[(.*)\]$", told.strip())
    assert code == 0 and late is not None, told
    assert set(late[1].replace("'", "").split(", ")) - {""} <= {"colorama", "mpmath", "sympy"}  # PyTorch brings them


def test_packages_that_cannot_be_imported_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    preflight.require_all()
    monkeypatch.setitem(sys.modules, "yacs", None)
    with pytest.raises(ImportError, match="missing here: yacs. Where nothing can be installed"):
        preflight.require_all()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "triton", None)
    preflight.require_all("cpu")
    with pytest.raises(ImportError, match="missing here: triton. Where nothing can be installed"):
        preflight.require_all()
    monkeypatch.undo()
    monkeypatch.setattr(preflight, "MODULES", ("not_there.at_all",))
    with pytest.raises(ImportError, match="missing here: not_there"):
        preflight.require_all()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A call whose work folder has a run that is not finished; nothing trains."""
    run = tmp_path / "work" / "runs" / "headline-r56-c10-seed0"
    (run / "checkpoint").mkdir(parents=True)
    (run / "config.toml").write_text(to_toml(TrainConfig(epochs=30)))
    (run / "metrics.jsonl").write_text("{}\n" * 7)
    (run / "checkpoint" / "gated.pt").write_bytes(os.urandom(1000))
    (tmp_path / "images.npz").touch()
    sources = {"cifar10": f"npz:{tmp_path / 'images.npz'}"}
    keys = [("headline-r56-c10", 0), ("headline-r56-c10", 1)]
    return Settings(keys, 1, 1e-4, "cpu", sources, [], tmp_path / "out", tmp_path / "work")


def hanging(monkeypatch: pytest.MonkeyPatch, pid: Path, finishing_s: float) -> None:
    """Let the process that trains be one that hangs, as does a process that it starts."""
    child = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    hang = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-S', '-c', {child!r}]); time.sleep(60)"
    monkeypatch.setattr(calls, "_SELF", (sys.executable, "-S", "-c", hang))
    monkeypatch.setattr(calls, "FINISHING_S", finishing_s)


def require_gone(pid: Path) -> None:
    done = subprocess.run(["ps", "-o", "stat=", "-p", pid.read_text()], capture_output=True, text=True)
    assert done.stdout.strip()[:1] in ("", "Z"), "what the call started outlived it"


def test_archives_are_there_when_a_call_had_to_be_ended(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    hanging(monkeypatch, tmp_path / "pid", 3.0)
    assert calls.call(settings, tmp_path / "results") == 3
    require_gone(tmp_path / "pid")
    require_brought_back(settings.out)
    told = capfd.readouterr().out
    assert "headline-r56-c10 seed 0: 7 of 30 epochs" in told and "headline-r56-c10 seed 1: not begun" in told
    # In another work folder, the archives alone bring the run back; OUT is read also where FROM is forgotten.
    later = replace(settings, work=tmp_path / "other")
    monkeypatch.setattr(calls, "_watched", lambda *_: 0)
    assert calls.call(later, tmp_path / "results") == 0
    name = "runs/headline-r56-c10-seed0/checkpoint/gated.pt"
    assert (later.work / name).read_bytes() == (settings.work / name).read_bytes()


def test_calls_in_one_folder_are_all_gone_on_from(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two calls, on two machines, of other runs: FROM names the folder above what they left."""
    monkeypatch.setattr(calls, "_watched", lambda *_: 3)
    begun = settings.work / "runs" / "headline-r56-c10-seed0"
    for seed in (0, 1):
        each = replace(settings, work=tmp_path / f"work{seed}", out=tmp_path / "calls" / str(seed))
        shutil.copytree(begun, each.work / "runs" / f"headline-r56-c10-seed{seed}")
        assert calls.call(each, tmp_path / "results") == 3
    later = replace(settings, work=tmp_path / "later", before=[tmp_path / "calls"])
    assert calls.call(later, tmp_path / "results") == 3
    for seed in (0, 1):
        path = later.work / "runs" / f"headline-r56-c10-seed{seed}" / "checkpoint" / "gated.pt"
        assert path.read_bytes() == (begun / "checkpoint" / "gated.pt").read_bytes()


def test_archives_are_there_after_sigterm(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging(monkeypatch, tmp_path / "pid", 60.0)
    threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(SystemExit) as leaving:
        calls.call(settings, tmp_path / "results")
    assert leaving.value.code == 143
    require_gone(tmp_path / "pid")
    require_brought_back(settings.out)


def test_archives_are_written_while_runs_go_on(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call may be ended without a word; what it wrote by then is all there is."""
    hanging(monkeypatch, tmp_path / "pid", 3.0)
    monkeypatch.setattr(calls, "PACK_EVERY_S", 0.2)
    written: list[list[str]] = []
    real = calls.write_packs

    def write(out: Path, found: list[Group], *rest: Any) -> Any:
        written.append([group.label for group in found])
        return real(out, found, *rest)

    monkeypatch.setattr(calls, "write_packs", write)
    monkeypatch.setattr(calls, "end", lambda process: (os.killpg(process.pid, signal.SIGKILL), written.append([])))
    assert calls.call(settings, tmp_path / "results") == 3
    # Before the end, and not again at the end: nothing had changed.
    assert written == [["rows of the ledger", "headline-r56-c10-seed0"], []]


def test_a_run_without_room_is_named(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calls, "_watched", lambda *_: 3)
    path = settings.work / "runs" / "headline-r56-c10-seed0" / "checkpoint" / "gated.pt"
    path.write_bytes(os.urandom(17_000_000))
    assert calls.call(settings, tmp_path / "results") == 3
    assert "headline-r56-c10-seed0: 17.0 MB have no room in" in capsys.readouterr().out
    require_brought_back(settings.out)


def test_what_the_ledger_has_is_done_and_travels_no_more(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    (results / "consensus").mkdir(parents=True)
    (results / "ledger.jsonl").write_bytes(ledger_text([row(seed=1)]))
    (results / "consensus" / "headline-r56-c10-seed1.json").write_text("{}")
    monkeypatch.setattr(calls, "_watched", lambda *_: 3)
    assert calls.call(settings, results) == 3
    assert "headline-r56-c10 seed 1: done\n" in capsys.readouterr().out
    # The process that trains sees the row, and the gates that a control of that run is made from.
    assert read_ledger(settings.work / "results" / "ledger.jsonl") == {("headline-r56-c10", 1): row(seed=1)}
    assert (settings.work / "results" / "consensus" / "headline-r56-c10-seed1.json").read_text() == "{}"
    pieces, _ = read_packs(find_packs([settings.out])[0])
    assert rows_of(pieces, tmp_path) == {} and not [name for name in pieces if "consensus" in name]


def test_rows_that_contradict_each_other_stop_a_call_before_it_begins(settings: Settings, tmp_path: Path) -> None:
    for place, top1 in ((tmp_path / "results", 93.0), (settings.work / "results", 94.0)):
        place.mkdir()
        (place / "ledger.jsonl").write_bytes(ledger_text([row(top1_last=top1)]))
    with pytest.raises(ValueError, match="headline-r56-c10, seed 0: .*work.* has another row than .*top1_last is 94.0"):
        calls.call(settings, tmp_path / "results")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"EXPERIMENTS": "headline-r56-c11"}, "unknown experiment 'headline-r56-c11'; did you mean headline-r56-c10"),
        ({"SEEDS": "7"}, "has the seeds 0, 1, 2, 3, 4, got 7"),
        ({"SEEDS": "one"}, "SEEDS: expected whole numbers, got 'one'"),
        ({"JOBS": "0"}, "JOBS: expected at least 1, got 0"),
        ({"MINUTES": "-1"}, "MINUTES: expected a number above 0, got '-1'"),
        ({"AMP": "half"}, "AMP: expected off, auto, bf16 or fp16, got 'half'"),
        ({"MINUTES": "nan"}, "MINUTES: expected a number above 0, got 'nan'"),
        ({"SOURCES": "cifar10"}, "SOURCES: expected NAME=SOURCE, got 'cifar10'"),
        ({"SOURCES": "cifar10=npz:nowhere.npz"}, "SOURCES: cifar10: found nothing at .*nowhere.npz"),
        ({"SOURCES": ""}, "SOURCES: expected a source of cifar10, such as cifar10=npz:data/cifar10.npz"),
        ({"OUT": "both", "WORK": "both/work"}, "WORK: expected a folder outside of OUT"),
    ],
)
def test_settings_that_cannot_be_are_told(environment: dict[str, str], message: str, tmp_path: Path) -> None:
    (tmp_path / "images.npz").touch()
    whole = {"STORE": str(tmp_path), "SOURCES": "cifar10=npz:images.npz", **environment}
    with pytest.raises(ValueError, match=message):
        Settings.read(whole, tmp_path)


def test_settings_have_defaults_and_absolute_paths(tmp_path: Path) -> None:
    (tmp_path / "cifar10.npz").touch()
    found = Settings.read({"STORE": str(tmp_path), "OUT": "out"}, tmp_path)
    wanted = {"headline-r56-c10", *(f"headline-r56-c10-{kind}" for kind in ("dense", "equal-macs", "fixed-at-init"))}
    assert wanted <= {name for name, _ in found.keys} <= {name for name in all_experiments() if name[:8] == "headline"}
    assert found.sources == {"cifar10": f"npz:{tmp_path / 'cifar10.npz'}"} and found.out == tmp_path / "out"
    assert found.work.is_absolute() and found.device == "cuda" and (found.jobs, found.minutes) == (3, 7.5)
    assert (found.amp, found.cuda_graph) == ("", False)


def test_amp_and_graphs_reach_the_runs(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"SOURCES": "cifar10=cifar10", "AMP": "bf16", "CUDA_GRAPH": "1"}
    found = Settings.read(environment, settings.work)
    assert (found.amp, found.cuda_graph) == ("bf16", True)
    seen: list[Any] = []
    monkeypatch.setattr(calls, "run_experiments", lambda bench, keys, jobs: seen.append(bench) or 0)
    monkeypatch.setenv("GATEDCONV_MINUTES_LEFT", "1")
    settings.work.mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(settings.work)
    assert calls.work(replace(settings, amp="bf16", cuda_graph=True, device="cuda")) == 0
    assert (seen[0].amp, seen[0].cuda_graph) == ("bf16", True)


def test_a_call_without_its_device_is_told(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device is visible"):
        calls.call(replace(settings, device="cuda"), tmp_path / "results")
    assert not settings.out.exists()
