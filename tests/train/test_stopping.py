"""Stopping on request, with several processes and under torchrun: all leave together, and nothing is lost."""

from __future__ import annotations

import os
import signal
import socket
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gatedconv.cli import main
from gatedconv.train import RunFolder, TrainConfig, run
from gatedconv.train.checkpoint import load_checkpoint
from gatedconv.train.distributed import Ranks
from gatedconv.train.stopping import StopPoll, StopRequest, stop_on_sigterm
from gatedconv.train.trainer import Trainer
from tests.image_files import write_npz
from tests.processes import run_ranks
from tests.tolerances import assert_close, near

CPU = torch.device("cpu")
RUN_ID = "TORCHELASTIC_RUN_ID"


# Of six steps to a consensus, all of them taught, the last four may shut gates; six more of the compact network.
ALL_AT_ONCE: dict[str, Any] = {
    "mac_weight": 0.0,
    "mac_control": "rank",
    "mac_ramp": (0.1, 0.5),
    "teacher_at": 0.1,
    "consensus_at": 0.5,
}


def config(archive: Path, **changes: Any) -> TrainConfig:
    settings = {
        "data": f"npz:{archive}",
        "epochs": 2,
        "batch_size": 8,
        "gate": "channel",
        "position": "middle",
        "mac_weight": 1.0,
        "latency": False,
        "device": "cpu",
        "threads": 1,
        "bn_reestimate": False,
    }
    return TrainConfig(**(settings | changes))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def process(rank: int, folder: str, ports: list[int]) -> None:
    """Runs that the second process is asked to end after some step, each continued; and one that is not interrupted."""
    import gatedconv.train.loop as loop
    from gatedconv import models
    from gatedconv.gating import pruner
    from gatedconv.train import trainer

    models.resnet20 = models.BUILDERS["resnet8"] = partial(models.ResNet, 8)  # one block a stage is enough
    pruner.EVERY = 2
    trainer.write_exports = lambda *arguments: []  # type: ignore[assignment]
    loop.StopPoll.EVERY_S = 0.0  # after every step
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    settings = config(Path(folder) / "blobs.npz", **ALL_AT_ONCE)
    made, real = [0], loop.Stepper.__call__

    def counted(self: Any, *arguments: Any) -> Any:
        taught = len(arguments) == 4  # not the teacher, which makes steps of its own
        made[0] += taught
        if rank == 1 and taught and made[0] == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *arguments)

    loop.Stepper.__call__ = counted  # type: ignore[method-assign]
    found: dict[str, Any] = {}
    for at, name in ((5, "early"), (12, "last"), (0, "straight")):  # of twelve steps
        made[0], left = 0, None
        os.environ["MASTER_PORT"] = str(ports.pop())
        with stop_on_sigterm() as stop:
            left = run(settings, RunFolder(Path(folder) / name), stop=stop)
        found[name] = {"made": made[0], "left": left is None}
        if at:
            made[0], os.environ["MASTER_PORT"] = 100, str(ports.pop())
            found[name]["resumed"] = run(settings, RunFolder(Path(folder) / name), resume=True) is not None
            found[name]["after"] = made[0] - 100
    torch.save(found, f"{folder}/found{rank}.pt")


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")
def test_one_process_that_gets_sigterm_stops_all_and_the_run_ends_the_same(tmp_path: Path) -> None:
    write_npz(tmp_path / "blobs.npz")
    run_ranks(process, str(tmp_path), [free_port() for _ in range(5)])
    straight = RunFolder(tmp_path / "straight")
    for rank in range(2):
        found = torch.load(tmp_path / f"found{rank}.pt")
        assert found["straight"] == {"made": 12, "left": False}
        assert found["early"] == {"made": 5, "left": True, "resumed": True, "after": 7}
        assert found["last"] == {"made": 12, "left": True, "resumed": True, "after": 0}
    for name in ("early", "last"):
        folder = RunFolder(tmp_path / name)
        for phase in ("gated", "compact"):
            state, expected = (load_checkpoint(each.checkpoint(phase)) for each in (folder, straight))
            assert state["model"].keys() == expected["model"].keys()
            assert_close(state["model"], expected["model"], algorithm="training")
            assert_close(state["teacher"]["model"], expected["teacher"]["model"], algorithm="training")
            if phase == "gated":
                assert 0 < expected["pruner"]["pruned"].sum() < len(expected["pruner"]["pruned"])
                assert_close(state["pruner"], expected["pruner"], algorithm="training")
        lines = folder.read_metrics()
        for line, plain in zip(lines, straight.read_metrics(), strict=True):
            assert line.train_loss == near(plain.train_loss, algorithm="metrics")
            assert line.train_macs == pytest.approx(plain.train_macs)
        assert folder.summary.is_file()


class Told(Ranks):
    """The first of two processes; the other one wishes nothing."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values


def test_processes_exchange_the_stop_about_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    for step_s, steps in ((0.01, 100), (0.3, 3), (5.0, 1), (1e-9, 1000)):
        now = [0.0]
        monkeypatch.setattr("gatedconv.train.loop.time.monotonic", lambda now=now: now[0])
        poll, asked = StopPoll(Told(0, 2), CPU), []
        for number in range(1, 2 * steps + 2):
            now[0] += step_s
            if poll.due():
                assert poll.any(False, number == 1) == [False, number == 1]
                asked.append(number)
        assert asked == [1, 1 + steps, 1 + 2 * steps]


def test_a_single_process_polls_after_every_step() -> None:
    poll = StopPoll(Ranks(), CPU)
    assert all(poll.due() for _ in range(5)) and poll.any(True, False) == [True, False]


def test_a_run_that_was_stopped_is_not_started_again_by_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Torchrun starts all again after any code but 0; without it the exit code 3 means that the run can continue."""
    archive = write_npz(tmp_path / "blobs.npz")
    flags = ["--data", f"npz:{archive}", "--epochs", "2", "--batch-size", "16", "--no-latency", "--max-minutes", "1e-9"]
    codes = []
    for name in ("alone", "torchrun"):
        if name == "torchrun":
            monkeypatch.setenv(RUN_ID, "some")
        codes.append(main(["train", "--folder", str(tmp_path / name), *flags, "--device", "cpu"]))
        assert "resume with: gatedconv train --resume" in capsys.readouterr().out
        assert not RunFolder(tmp_path / name).summary.is_file()
    assert codes == [3, 0]


def test_under_torchrun_an_existing_run_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often torchrun has started the job: the count of restarts differs between machines."""
    monkeypatch.setattr("gatedconv.train.trainer.write_exports", lambda *_: [])  # they take longer than all the rest
    settings = config(write_npz(tmp_path / "blobs.npz"), epochs=3, gate="none")
    folder, stop = RunFolder(tmp_path / "run"), StopRequest()

    stop.requested = True
    assert run(settings, folder, stop=stop) is None
    with pytest.raises(ValueError, match="holds a run already"):
        run(settings, folder)
    monkeypatch.setenv(RUN_ID, "some")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert run(settings, folder) is not None and len(folder.read_metrics()) == 3
    with pytest.raises(ValueError, match="a run keeps its recipe: expected lr"):
        run(config(tmp_path / "blobs.npz", epochs=3, gate="none", lr=0.9), folder)


def test_a_stop_outside_of_training_ends_the_process() -> None:
    stop = StopRequest()
    with stop.deferred():
        stop.request()
    assert stop.requested
    with pytest.raises(SystemExit) as left:
        stop.request()
    assert left.value.code == 3


@pytest.mark.parametrize(("by_torchrun", "code"), [(False, 3), (True, 0)], ids=["alone", "torchrun"])
def test_sigterm_after_the_last_step_leaves_as_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_torchrun: bool, code: int
) -> None:
    """While networks are compacted and measured, too, torchrun must not start the job again."""
    if by_torchrun:
        monkeypatch.setenv(RUN_ID, "some")
    monkeypatch.setattr(Trainer, "finish", lambda *arguments: os.kill(os.getpid(), signal.SIGTERM))
    flags = ["--data", f"npz:{write_npz(tmp_path / 'blobs.npz')}", "--epochs", "1", "--batch-size", "16"]
    folder = RunFolder(tmp_path / "run")
    assert main(["train", "--folder", str(folder.path), *flags, "--no-latency", "--device", "cpu"]) == code
    assert folder.holds_checkpoint() and not folder.summary.is_file()
