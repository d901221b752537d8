from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import gatedconv as package
from gatedconv.cli import COMMANDS
from gatedconv.cli.config_flags import merge_settings
from gatedconv.cli.saved_networks import image_size
from gatedconv.train import RunFolder, TrainConfig
from gatedconv.train.config import field_specs
from tests.tolerances import assert_close

Call = Callable[..., object]


@pytest.mark.usefixtures("shallow")
def test_train_then_every_other_command(gatedconv: Call, quick: list[object], tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained = gatedconv("train", *quick, "--dense-baseline", "--run", run)
    assert trained.code == 0, trained.err
    assert "gated   2/2" in trained.out and "agreement (%)" in trained.out and f"written to {run}" in trained.out
    assert {"config.toml", "metrics.jsonl", "checkpoint", "summary.json", "plots"} <= {p.name for p in run.iterdir()}
    assert {path.name for path in (run / "plots").iterdir()} == {"curves.png", "gate_evolution.png"}
    summary = json.loads((run / "summary.json").read_text())

    evaluated = gatedconv("eval", run)
    assert evaluated.code == 0, evaluated.err
    rows = {line.split()[0]: line.split()[1:] for line in evaluated.out.splitlines()[2:]}
    assert rows["dense"][0] == f"{summary['dense']['top1']:.2f}"
    assert rows["compact"][:2] == [f"{summary['frozen']['top1']:.2f}", f"{summary['frozen']['macs'] / 1e6:.2f}"]
    single = gatedconv("eval", run / "compact.safetensors", *quick[:2])
    assert single.code == 0 and single.out.splitlines()[2].split() == ["compact", *rows["compact"]]

    frozen = gatedconv("freeze", run)
    assert frozen.code == 0, frozen.err
    again = json.loads((run / "summary.json").read_text())
    assert {**again, "wall_s": 0} == {**summary, "wall_s": 0}

    out = tmp_path / "net.pt2"
    assert gatedconv("export", run, "--format", "torch", "--out", out).code == 0
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        expected = package.load(run / "compact.safetensors")(images)
        assert_close(torch.export.load(out).module()(images), expected)

    bench = gatedconv("bench", run, "--batch", 2, "--rounds", 2, "--peers", "eager")
    assert bench.code == 0, bench.err
    measured = {tuple(line.split()[:3]) for line in bench.out.splitlines()[2:]}
    assert measured >= {(name, "2", by) for name in ("dense", "compact") for by in ("gatedconv", "eager")}
    exported = gatedconv("bench", out, "--batch", 3, "--rounds", 1, "--peers", "eager", "--all-settings")
    assert exported.code == 0, exported.err
    assert {tuple(line.split()[:3]) for line in exported.out.splitlines()[2:]} >= {("net", "3", "eager")}

    layer = gatedconv("bench", "n2 i6 o8 h7 k3 s2 open50", "--rounds", 1)
    assert layer.code == 0 and "6->8 3x3/2 @7, 50 % open" in layer.out and "mkldnn" in layer.out

    reported = gatedconv("report", run, run)
    assert reported.code == 0 and "agreement" in reported.out and str(run / "plots" / "curves.png") in reported.out


def test_a_network_of_another_class_is_measured_and_written_at_its_own_size(gatedconv: Call, tmp_path: Path) -> None:
    layers = [torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3)]
    images = torch.randn(2, 1, 28, 28)
    model = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(4 * 24 * 24, 3)).eval()
    gated = package.gate_model(model, "channel", example_input=images)
    masks = {name: torch.arange(gate.num_gates) % 2 > 0 for name, gate in package.gates(gated).items()}
    small = package.compact(package.freeze(gated, masks=masks), images)
    package.save(small, tmp_path / "small.safetensors")
    assert image_size(package.load(tmp_path / "small.safetensors")) == (1, 28, 28)
    bench = gatedconv("bench", tmp_path / "small.safetensors", "--rounds", 1, "--peers", "eager")
    assert bench.code == 0, bench.err
    out = tmp_path / "net.pt2"
    exported = gatedconv("export", tmp_path / "small.safetensors", "--format", "torch", "--out", out)
    assert exported.code == 0, exported.err
    with torch.no_grad():
        assert_close(torch.export.load(out).module()(images), small(images))


@pytest.mark.usefixtures("no_exports", "shallow")
def test_resume_continues_an_unfinished_run(gatedconv: Call, quick: list[object], tmp_path: Path) -> None:
    run = tmp_path / "run"
    stopped = gatedconv("train", *quick, "--run", run, "--max-minutes", "1e-9")
    assert stopped.code == 3 and f"gatedconv train --resume {run}" in stopped.out
    unfinished = gatedconv("report", run, "--no-plots")
    assert unfinished.code == 0 and "not finished" in unfinished.out
    resumed = gatedconv("train", "--resume", run, "--max-minutes", 0)
    assert resumed.code == 0 and (run / "summary.json").is_file(), resumed.err
    new = tmp_path / "new"
    new.mkdir()
    shutil.copy(run / "config.toml", new)
    both = gatedconv("report", run, new)
    assert both.code == 0 and f"{new}: not finished" in both.out and "agreement (%)" in both.out, both.err


@pytest.mark.usefixtures("no_exports", "shallow")
def test_runs_get_folders_of_their_own(
    gatedconv: Call, quick: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        result = gatedconv("train", *quick, "--gate", "none", "--epochs", 1, "--seed", 7)
        assert result.code == 0, result.err
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        "resnet20-none-blobs-seed7",
        "resnet20-none-blobs-seed7-2",
    ]


@pytest.mark.usefixtures("no_exports", "shallow")
def test_an_export_has_the_name_of_its_network(gatedconv: Call, quick: list[object], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert gatedconv("train", *quick, "--run", run, "--gate", "none", "--epochs", 1).code == 0
    exported = gatedconv("export", run, "--format", "torch")
    assert exported.code == 0 and exported.out == f"written to {run / 'dense.pt2'}\n"


def test_every_field_is_a_flag(gatedconv: Call) -> None:
    text = gatedconv("train", "--help").out
    for name, spec in field_specs().items():
        assert f"--{name.replace('_', '-')}" in text
        if isinstance(spec.default, bool):
            assert f"--no-{name.replace('_', '-')}" in text


def test_flag_beats_file_beats_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("epochs = 7\nlr = 0.5\nmilestones = [0.25]\n")
    config = merge_settings("best-c10-r56", file, {"lr": 0.7})
    assert (config.batch_size, config.epochs, config.lr, config.milestones) == (128, 7, 0.7, (0.25,))
    assert merge_settings(None, None, {}) == TrainConfig()


def test_flags_of_every_kind_reach_the_config(gatedconv: Call, quick: list[object], tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ["--no-nesterov", "--milestones", 0.1, 0.2, "--schedule", "staged", "--lr", "1e-2", "--name", "a b"]
    assert gatedconv("train", *quick, *flags, "--max-minutes", "1e-9", "--run", run).code == 3
    config = RunFolder(run).read_config()
    assert (config.nesterov, config.milestones, config.schedule) == (False, (0.1, 0.2), "staged")
    assert (config.lr, config.name, config.latency) == (0.01, "a b", False)


def test_top_level_help_and_version(gatedconv: Call) -> None:
    text = gatedconv().out
    assert all(name in text for name in COMMANDS)
    assert gatedconv("--help").out == text
    assert gatedconv("--version").out.startswith("gatedconv ")
    unknown = gatedconv("trian")
    assert unknown.code == 2 and "unknown command 'trian'" in unknown.err


def test_module_and_script_are_one() -> None:
    done = subprocess.run([sys.executable, "-m", "gatedconv", "nothing"], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "unknown command" in done.stderr


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from gatedconv.cli import main; main(['--help']); "
        "print([m for m in ('matplotlib', 'sklearn', 'fvcore', 'rich', 'onnx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_env(gatedconv: Call) -> None:
    assert torch.__version__ in gatedconv("env").out
    assert isinstance(json.loads(gatedconv("env", "--json").out), dict)
