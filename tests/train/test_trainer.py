from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import gatedconv
from gatedconv.data import EvalBatches, ImageData, TrainBatches
from gatedconv.deploy import re_estimate_batchnorm
from gatedconv.train import Callback, EpochMetrics, RunFolder, TrainConfig, run
from gatedconv.train.build import build_model, load_images
from gatedconv.train.metrics import TensorBoard, evaluate
from gatedconv.train.stopping import StopRequest
from gatedconv.train.summary import measure_energies
from reproduce.experiments import find_experiment
from reproduce.rows import training_row
from tests.image_files import write_npz
from tests.tolerances import assert_close, in_decimals, near


@pytest.fixture(autouse=True)
def no_exports(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports take longer than the runs: one test has them."""
    if "exports" not in request.node.name:
        monkeypatch.setattr("gatedconv.train.trainer.write_exports", lambda *_: [])


class Recorder(Callback):
    def __init__(self) -> None:
        self.phases: list[str] = []
        self.epochs: list[EpochMetrics] = []
        self.replayed: list[EpochMetrics] = []
        self.notes: list[str] = []

    def phase(self, phase: str) -> None:
        self.phases.append(phase)

    def epoch(self, metrics: EpochMetrics) -> None:
        self.epochs.append(metrics)

    def replay(self, metrics: EpochMetrics) -> None:
        self.replayed.append(metrics)

    def note(self, text: str) -> None:
        self.notes.append(text)


def small(archive: Path, **changes: Any) -> TrainConfig:
    settings = {
        "data": f"npz:{archive}",
        "epochs": 2,
        "batch_size": 16,
        "mac_weight": 4.0,
        "mac_target": 0.5,
        "dense_baseline": True,
        "device": "cpu",
    }
    return TrainConfig(**(settings | changes))


def test_a_run_writes_everything_and_the_summary_is_true(tmp_path: Path, archive: Path) -> None:
    config, folder, heard = small(archive, tensorboard=True), RunFolder(tmp_path / "run"), Recorder()
    summary = run(config, folder, callback=heard)
    assert summary is not None and summary == folder.read_summary()
    assert heard.phases == ["dense", "gated", "finish"]
    assert [(line.phase, line.epoch) for line in heard.epochs] == [
        ("dense", 1),
        ("dense", 2),
        ("gated", 1),
        ("gated", 2),
    ]
    assert [json.loads(line) for line in folder.metrics.read_text().splitlines()] == [
        line.as_dict() for line in heard.epochs
    ]
    assert folder.read_config() == config
    assert list((folder.path / "tensorboard").iterdir())

    data = load_images(config)
    test = (data.test_images.float() / 255 - data.mean[0]) / data.std[0]
    for name, kind in (("dense", "dense"), ("frozen", "compact")):
        net = gatedconv.load(folder.model(kind))
        with torch.no_grad():
            right = (net(test).argmax(1) == data.test_labels).double().mean().item()
        assert summary[name]["top1"] == in_decimals(100 * right, 4)
        assert summary[name]["params"] == sum(p.numel() for p in net.parameters())
        assert summary[name]["macs"] == gatedconv.count_macs(net, test[:1])
        assert set(summary[name]["latency_ms"]) == {"1", "32"}
        assert all(ms > 0 for ms in summary[name]["latency_ms"].values())
        if gatedconv.Engine(net, test[:1]).plans:
            assert set(summary[name]["engine_latency_ms"]) == {"1", "32"}
    assert summary["macs_dense"] == near(summary["dense"]["macs"])
    assert 0 <= summary["agreement"] <= 1 and 0 <= summary["pruning_rate"] <= 1
    assert (
        summary["seed"] == 0
        and summary["wall_s"] > 0
        and summary["versions"]["torch"] == torch.__version__.split("+")[0]
    )


def test_exports_compute_what_the_compact_network_computes(tmp_path: Path, archive: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    summary = run(small(archive, epochs=1, dense_baseline=False, latency=False), folder)
    assert summary is not None and "dense" not in summary and "latency_ms" not in summary["frozen"]
    assert summary["exports"] == ["compact.onnx", "compact.pt2"]
    images = torch.randn(3, 1, 8, 8)
    net = gatedconv.load(folder.model("compact"))
    with torch.no_grad():
        expected = net(images)
        exported = torch.export.load(folder.path / "compact.pt2").module()(images)
    assert_close(exported, expected)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder.path / "compact.onnx"))
    (output,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert_close(output, expected.numpy())


def test_networks_carry_the_energy_of_an_image(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    net, config, asked = nn.Identity(), small(Path("none")), []
    counter = SimpleNamespace(name="fake", span=None)
    monkeypatch.setattr("gatedconv.measure.energy.find_counters", lambda device, host=True: ([counter], ""))
    monkeypatch.setattr(
        "gatedconv.train.summary.energy_per_call",
        lambda call, meter, synchronize: asked.append(len(call())) or 0.1 * len(call()),
    )
    found = measure_energies(net, config, data)
    assert asked == [1, 32] and found == {"energy_j": {"1": 0.1, "32": 3.2}, "energy_j_image": pytest.approx(0.1)}
    monkeypatch.setattr("gatedconv.measure.energy.find_counters", lambda device, host=True: ([], "no RAPL zones"))
    assert measure_energies(net, config, data) == {"energy_j": None, "energy_j_image": None}


def begun(path: Path) -> RunFolder:
    folder = RunFolder(path)
    folder.begin(TrainConfig(), resume=False)
    return folder


@pytest.mark.parametrize("joules", [0.0021, None])
def test_the_ledger_takes_over_the_energy_of_an_image(tmp_path: Path, joules: float | None) -> None:
    net = {"top1": 93.0, "macs": 1e8, "params": 5, "energy_j": None, "energy_j_image": joules}
    summary = {
        "dense": net,
        "model": "resnet56",
        "epochs": {"dense": 3},
        "device": "cpu",
        "commit": None,
        "versions": {},
        "wall_s": 1.0,
        "evaluated_on": "test",
        "train_macs": 3e15,
    }
    experiment = find_experiment("headline-r56-c10-dense")
    row = training_row(experiment, 0, begun(tmp_path), summary, {})
    assert row.energy_j_image == joules
    assert (row.train_macs, row.top1_teacher) == (3e15, None)


def test_a_row_of_the_recipe_has_the_dense_network_too(tmp_path: Path) -> None:
    net = {"top1": 76.0, "macs": 5e6, "params": 5}
    summary = {
        "dense": net | {"top1": 78.0, "macs": 1e7},
        "frozen": net,
        "model": "resnet20",
        "epochs": {"gated": 17, "compact": 7},
        "device": "cpu",
        "commit": None,
        "versions": {},
        "wall_s": 1.0,
        "evaluated_on": "test",
        "train_macs": 1e12,
        "macs_dense": 1e7,
        "open_ratio": 0.5,
        "pruning_rate": 0.5,
        "polarization": 0.0,
        "agreement": 1.0,
        "dynamic": {"top1": 70.0, "macs": 5e6},
    }
    row = training_row(find_experiment("cpu-r20-c10"), 0, begun(tmp_path), summary, {})
    assert (row.top1_last, row.top1_teacher, row.macs, row.macs_dense, row.epochs) == (76.0, 78.0, 5e6, 1e7, 24)


def test_a_run_counts_what_it_trains_after_compacting(tmp_path: Path, archive: Path) -> None:
    """What is left carries no costs of its pieces; it is counted as it is deployed."""
    config = small(archive, dense_baseline=False, latency=False, consensus_at=0.5, recompute=True)
    folder = RunFolder(tmp_path / "run")
    summary = run(config, folder)
    assert summary is not None
    gated, compact = folder.read_metrics()
    assert (gated.phase, compact.phase) == ("gated", "compact")
    net = gatedconv.load(folder.model("compact"))
    macs = gatedconv.count_macs(net, torch.zeros(1, 1, 8, 8))
    assert compact.train_macs == pytest.approx(3 * 48 * macs) and compact.macs_saved == 0
    assert summary["train_macs"] == pytest.approx(gated.train_macs + compact.train_macs)


def test_an_interrupted_run_resumes_to_the_same_summary(tmp_path: Path, archive: Path) -> None:
    config = small(archive, latency=False)

    class Interrupting(Recorder):
        def epoch(self, metrics: EpochMetrics) -> None:
            super().epoch(metrics)
            if (metrics.phase, metrics.epoch) == ("gated", 1):
                raise KeyboardInterrupt

    straight, interrupted = RunFolder(tmp_path / "straight"), RunFolder(tmp_path / "interrupted")
    expected = run(config, straight)
    with pytest.raises(KeyboardInterrupt):
        run(config, interrupted, callback=Interrupting())
    heard = Recorder()
    got = run(config, interrupted, resume=True, callback=heard)
    assert expected is not None and got is not None
    varying = {"wall_s", "commit"}
    assert {k: v for k, v in got.items() if k not in varying} == {k: v for k, v in expected.items() if k not in varying}
    assert [len(lines) for lines in (heard.replayed, heard.epochs, interrupted.read_metrics())] == [3, 1, 4]
    for kind in ("dense", "gated", "compact"):
        left, right = (gatedconv.load(folder.model(kind)).state_dict() for folder in (straight, interrupted))
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_time_limit_ends_a_run_that_can_be_resumed(tmp_path: Path, archive: Path) -> None:
    folder, heard = RunFolder(tmp_path / "run"), Recorder()
    config = small(archive, dense_baseline=False, latency=False, max_minutes=1e-9)
    assert run(config, folder, callback=heard) is None
    assert "stopped after 0 of 2 epochs" in heard.notes[0] and not folder.summary.exists()
    assert run(dataclasses.replace(config, max_minutes=0.0), folder, resume=True) is not None


def test_a_run_that_is_stopped_after_compacting_reports_all_its_epochs(
    tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(archive, dense_baseline=False, latency=False, consensus_at=0.5, max_minutes=9.0)
    monkeypatch.setattr("gatedconv.train.loop.Training._deadline_passed", lambda self: self.phase == "compact")
    heard = Recorder()
    assert run(config, RunFolder(tmp_path / "run"), callback=heard) is None
    assert "stopped after 1 of 2 epochs (compact)" in heard.notes[-1]


def test_a_run_with_a_small_time_limit_is_resumed_to_its_end(
    tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a scheduler that queues the job again and again; every start makes a step at least."""
    config, folder = small(archive, latency=False, epochs=1, max_minutes=1e-9), RunFolder(tmp_path / "run")
    starts = [run(config, folder, resume=number > 0) is not None for number in range(5)]
    assert starts == [False] * 4 + [True]  # three steps dense, and three gated: the last dense start makes one of these
    assert [(line.phase, line.epoch) for line in folder.read_metrics()] == [("dense", 1), ("gated", 1)]


@pytest.mark.parametrize("damaged", [False, True])
def test_a_resume_that_is_stopped_early_loses_no_metrics(
    tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    """The dense training is reported again before the gated one continues; a stop may come in between."""
    config, folder, stop = small(archive, latency=False), RunFolder(tmp_path / "run"), StopRequest()

    class Stopping(Callback):
        def epoch(self, metrics: EpochMetrics) -> None:
            stop.requested = (metrics.phase, metrics.epoch) == ("gated", 1)

    assert run(config, folder, callback=Stopping(), stop=stop) is None
    before = folder.metrics.read_text()
    assert [json.loads(line)["phase"] for line in before.splitlines()] == ["dense", "dense", "gated"]
    assert run(config, folder, resume=True, stop=stop) is None
    assert folder.metrics.read_text() == before
    if damaged:
        folder.metrics.write_text("what?\n" + before)
    assert run(config, folder, resume=True) is not None
    told = [(line.phase, line.epoch) for line in folder.read_metrics()]
    assert told == [("dense", 1), ("dense", 2), ("gated", 1), ("gated", 2)]
    assert folder.metrics.read_text().startswith(before)


class Tiring:
    """A counter that rises by a joule whenever it is read, so many times."""

    span = None

    def __init__(self, reads: int, name: str) -> None:
        self.left, self.joules, self.name = reads, 0.0, name

    def read(self) -> float:
        self.left -= 1
        self.joules += self.left >= 0
        return self.joules


@pytest.mark.parametrize("reads", [3, 99])
def test_a_summary_gives_the_reason_of_unknown_energy(
    tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch, reads: int
) -> None:
    """One epoch that could not be measured is enough; a meter asked at the end would have nothing to complain of."""
    counter = Tiring(reads, "CPU package-0 (RAPL)")
    monkeypatch.setattr("gatedconv.measure.energy.find_counters", lambda device, host=True: ([counter], ""))
    config, folder = small(archive, gate="none", epochs=2, latency=False), RunFolder(tmp_path / "run")
    summary = run(config, folder)
    assert summary is not None and summary["energy_source"] == counter.name
    first, second = folder.read_metrics()
    assert first.energy_j == 2.0 and not first.energy_reason  # read at the start, the last step and the end
    if reads == 3:
        assert second.energy_j is None and summary["energy_j"] is None
        assert summary["energy_reason"] == second.energy_reason == f"{counter.name}: the counter does not move"
    else:
        assert summary["energy_j"] == 4.0 and summary["energy_reason"] is None


def test_a_dense_run_has_no_frozen_part(tmp_path: Path, archive: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    summary = run(small(archive, gate="none", epochs=1, latency=False), folder)
    assert summary is not None and "frozen" not in summary and "agreement" not in summary
    assert summary["dense"]["macs"] > 0 and not folder.model("compact").exists()


def with_biases(biases: list[float]) -> Any:
    """build_model whose gates decide by these biases, one a gate, whatever they see."""

    def build(config: TrainConfig, data: ImageData, *, gated: bool = True) -> nn.Module:
        model = build_model(config, data, gated=gated)
        for gate, bias in zip(gatedconv.gates(model).values(), biases, strict=False):
            nn.init.zeros_(gate.fc2.weight)
            nn.init.constant_(gate.fc2.bias, bias)
        return model

    return build


@pytest.mark.parametrize(
    ("dead", "changes", "noted"),
    [
        (4, {"mac_weight": 0.0}, 0),
        (5, {"mac_weight": 0.0}, 1),
        (5, {"mac_target": 0.5}, 0),  # half of the MACs is what was asked for
    ],
)
def test_dead_gates_are_noted_once_unless_they_are_wanted(
    tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch, dead: int, changes: dict[str, Any], noted: int
) -> None:
    monkeypatch.setattr("gatedconv.train.build.build_model", with_biases([-50.0] * dead + [50.0] * (9 - dead)))
    heard = Recorder()
    config = small(archive, dense_baseline=False, latency=False, **changes)
    run(config, RunFolder(tmp_path / "r"), callback=heard)
    assert [line.gates_dead for line in heard.epochs] == [dead, dead]
    notes = [note for note in heard.notes if "gates are" in note]
    assert len(notes) == noted and all("5 of 9 gates are dead, closed for every image" in note for note in notes)


def test_a_slow_precision_is_noted_first(tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gatedconv.train.trainer.precision_note", lambda amp, device: f"{amp} is slow here")
    heard = Recorder()
    run(small(archive, epochs=1, dense_baseline=False, amp="bf16"), RunFolder(tmp_path / "run"), callback=heard)
    assert heard.notes[0] == "bf16 is slow here"


def test_a_damaged_checkpoint_is_noted(tmp_path: Path, archive: Path) -> None:
    folder, heard = RunFolder(tmp_path / "r"), Recorder()
    config = small(archive, dense_baseline=False, latency=False)
    run(config, folder)
    path = folder.checkpoint("gated")
    path.write_bytes(path.read_bytes()[:-5])
    assert run(config, folder, resume=True, callback=heard) is not None
    assert any("damaged checkpoint" in note and "gated.previous.pt" in note for note in heard.notes)


@pytest.mark.parametrize("from_start", [True, False])
def test_a_resumed_run_adds_each_epoch_to_tensorboard_once(
    tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch, from_start: bool
) -> None:
    """Also where the event files begin with the resumed run, which then has the earlier epochs, too."""
    from torch.utils.tensorboard import SummaryWriter

    points: list[tuple[str, int]] = []
    real = SummaryWriter.add_scalar

    def add_scalar(self: Any, name: str, value: float, step: int) -> None:
        points.append((name, step))
        real(self, name, value, step)

    monkeypatch.setattr(SummaryWriter, "add_scalar", add_scalar)
    folder, stop = RunFolder(tmp_path / "run"), StopRequest()
    config = small(archive, gate="none", latency=False)

    class Stopping(Callback):
        def epoch(self, metrics: EpochMetrics) -> None:
            stop.request()

    first = dataclasses.replace(config, tensorboard=from_start)
    assert run(first, folder, callback=Stopping(), stop=stop) is None
    assert run(dataclasses.replace(config, tensorboard=True), folder, resume=True) is not None
    assert [step for name, step in points if name == "dense/lr"] == [1, 2]


def test_tensorboard_that_cannot_be_written_names_the_folder(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file in the place of the folder")
    with pytest.raises(OSError, match="tensorboard: could not be written"):
        TensorBoard(tmp_path / "tensorboard")


def test_stuck_gates_off_target_are_noted(tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates far beyond the window cannot reach the target; the run must report that."""
    monkeypatch.setattr("gatedconv.train.build.build_model", with_biases([50.0] * 9))
    heard = Recorder()
    summary = run(
        small(archive, dense_baseline=False, epochs=1, latency=False), RunFolder(tmp_path / "r"), callback=heard
    )
    assert any("all 9 gates are saturated at 100.0% of the dense MACs, mac_target is 50.0%" in n for n in heard.notes)
    assert summary["frozen"]["macs"] == near(summary["macs_dense"])


def test_a_folder_is_never_overwritten(tmp_path: Path, archive: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    config = small(archive, epochs=1, gate="none", latency=False)
    run(config, folder)
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="holds a run already"):
        run(config, folder)
    with pytest.raises(ValueError, match="expected a run to resume, found none"):
        run(config, RunFolder(tmp_path / "other"), resume=True)
    assert before == {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}


def test_same_seed_same_weights_dense_and_gated(archive: Path) -> None:
    """Dense and gated networks of one seed differ only by what gates are."""
    config = small(archive)
    data = load_images(config)
    dense, gated = build_model(config, data, gated=False).state_dict(), build_model(config, data).state_dict()
    assert all(torch.equal(value, gated[name]) for name, value in dense.items())
    assert all("gate" in name for name in gated.keys() - dense.keys())


def test_reestimated_statistics_are_the_means_over_the_batches(data: ImageData) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 3))
    batches = [batch for batch in EvalBatches(data, "train", batch_size=16)]
    weight = model[3].weight.clone()
    model.eval()
    re_estimate_batchnorm(model, batches)
    outputs = [model[0](images).detach() for images, _ in batches]
    means = torch.stack([output.mean((0, 2, 3)) for output in outputs]).mean(0)
    variances = torch.stack([output.transpose(0, 1).flatten(1).var(1) for output in outputs]).mean(0)
    torch.testing.assert_close(model[1].running_mean, means)
    torch.testing.assert_close(model[1].running_var, variances)
    assert model[1].momentum == 0.1 and not model[1].training and torch.equal(model[3].weight, weight)


def test_statistics_whose_estimate_fails_stay_as_they_are() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.BatchNorm2d(2)).train()
    model[2].eval()
    model(torch.randn(4, 1, 8, 8))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for batches, error in (
        ([(torch.randn(4, 1, 8, 8),) * 2, (torch.randn(4, 3, 8, 8),) * 2], RuntimeError),
        ([], ValueError),
    ):
        with pytest.raises(error):
            re_estimate_batchnorm(model, batches)
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert [m.training for m in model] == [True, True, False] and model[1].momentum == 0.1
    with pytest.raises(RuntimeError):
        evaluate(model, [(torch.randn(4, 3, 8, 8), torch.zeros(4))])
    assert [m.training for m in model] == [True, True, False]


def test_damaged_records_are_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(ValueError, match=r"expected a run folder with config\.toml, found none"):
        folder.read_config()
    with pytest.raises(ValueError, match=r"expected a finished run with summary\.json, found none"):
        folder.read_summary()
    folder.summary.write_text("{")
    with pytest.raises(ValueError, match=r"summary\.json: expected JSON"):
        folder.read_summary()
    assert folder.read_metrics() == []
    good = json.dumps(EpochMetrics("gated", 1, 0.1, 1.0, 50.0, 1.0, 50.0, 1.0).as_dict())
    folder.metrics.write_text(f"{good}\n{good[:20]}")
    assert len(folder.read_metrics()) == 1
    folder.metrics.write_text(f"{good[:20]}\n{good}\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 1 is damaged"):
        folder.read_metrics()


def test_validation_runs_never_see_the_test_split(tmp_path: Path) -> None:
    archive = write_npz(tmp_path / "a.npz")
    config = small(archive, evaluate_on="val", val_fraction=0.25)
    data, full = load_images(config), load_images(dataclasses.replace(config, evaluate_on="test"))
    assert len(data.train_labels) == 36 and len(data.test_labels) == 12
    trained_on = {image.numpy().tobytes() for image in full.train_images}
    assert all(image.numpy().tobytes() in trained_on for image in data.test_images)
    assert len(TrainBatches(data, 16)) == 2
