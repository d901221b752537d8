"""Two processes of gloo against one: training, votes, masks, norms of gates, and what they send each other."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import gatedconv
from gatedconv.data import EvalBatches, load_data
from gatedconv.gating.collectives import require_same_masks, synchronized_norm
from gatedconv.measure import energy
from gatedconv.models.resnet import ResNet
from gatedconv.train import RunFolder, TrainConfig
from gatedconv.train.distributed import current
from gatedconv.train.step import Stepper
from tests.image_files import write_npz
from tests.processes import run_ranks
from tests.tolerances import assert_close, in_decimals, near
from tests.train.steps import train
from tests.train.still_norms import StillNorms, still_network

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")
# 15 images on two ranks: 7 and 8.
CONFIG = TrainConfig(
    epochs=2,
    batch_size=15,
    lr=0.05,
    gate="both",
    position="middle",
    mac_weight=1.0,
    act_weight=0.1,
    polar_weight=2.0,
    polar_schedule="constant",
    device="cpu",
)
# Losses on gates that are linear in the open rates, for which it is all one how a batch is divided.
LINEAR: dict[str, Any] = {"batch_size": 16, "polar_weight": 0.0, "mac_weight": 0.0, "act_weight": 1.0}


def trained(archive: Path, **changes: Any) -> dict[str, Any]:
    model, data = still_network("both"), load_data(f"npz:{archive}")
    config = dataclasses.replace(CONFIG, **changes)
    lines = list(train(model, data, config, checkpoint=archive.with_suffix(f".{current().world}.pt")))
    ranks = current()
    frozen = gatedconv.freeze(model, EvalBatches(data, "train", rank=ranks.rank, world=ranks.world))
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "metrics": [line.as_dict() for line in lines],
        "masks": frozen.consensus.masks,
        "rates": frozen.consensus.open_rates,
    }


def counted_step(archive: Path) -> list[str]:
    """The collectives of one step that are not DistributedDataParallel's own."""
    calls: list[str] = []
    real = dist.all_reduce

    def counting(tensor: torch.Tensor, *rest: Any, **options: Any) -> Any:
        calls.append(f"{tensor.numel()} x {tensor.dtype}")
        return real(tensor, *rest, **options)

    stepper = Stepper(still_network("both").train(), CONFIG, torch.device("cpu"), current())
    with pytest.MonkeyPatch.context() as patch, stepper.active():
        patch.setattr(dist, "all_reduce", counting)
        stepper(torch.randn(7 + current().rank, 1, 8, 8), torch.zeros(7 + current().rank, dtype=torch.int64), 0.0)
    return calls


def broken_step(index: int) -> list[bool | int]:
    """A step of fp16 in which the images of the second rank alone are broken: what each rank holds it for."""
    config = dataclasses.replace(CONFIG, amp="fp16", gate="none", skip_blocks=False)
    torch.manual_seed(1)
    stepper = Stepper(ResNet(8, 3, None, input_size=(1, 8, 8)), config, torch.device("cpu"), current())
    images = torch.randn(7 + index, 1, 8, 8) * (float("nan") if index else 1.0)
    with stepper.active():
        result = stepper(images, torch.zeros(7 + index, dtype=torch.int64), 0.0)
    return [bool(result.bad), int(stepper.guard.skipped)]


class Counting:
    """A counter of this machine, which a step of the clock moves by a joule."""

    name, span = "fake", None

    def __init__(self) -> None:
        self.joules = 0.0

    def read(self) -> float:
        self.joules += 1
        return self.joules


def step_with_shut_images(images: slice) -> dict[str, Any]:
    """Two steps of a network whose first block shuts itself for images of zeros, the first half of the batch."""
    torch.manual_seed(1)
    model = StillNorms(8, 3, "layer", input_size=(1, 8, 8)).train()
    gate = next(iter(gatedconv.gates(model).values()))
    for layer, weight, bias in ((gate.fc1, 1.0, 0.0), (gate.fc2, 1.0, -3.0)):
        torch.nn.init.constant_(layer.weight, weight)
        torch.nn.init.constant_(layer.bias, bias)
    whole = torch.cat([torch.zeros(8, 1, 8, 8), torch.randn(8, 1, 8, 8)])
    config = dataclasses.replace(CONFIG, gate="layer", position="after", batch_size=16)
    stepper = Stepper(model, config, torch.device("cpu"), current())
    with stepper.active():
        for epoch in (1.0, 1.5):
            stepper(whole[images], (torch.arange(16) % 3)[images], epoch)
    return {"weights": dict(model.named_parameters()), "saved": stepper.macs.saved}


def norm_of_the_whole(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """A norm and a loss over this rank's share of x; gradients as DistributedDataParallel averages them."""
    ranks = current()
    mine = x[: 3 if ranks.rank == 0 else 5] if ranks.rank == 0 else x[3:]
    norm = synchronized_norm(torch.nn.BatchNorm1d(4))
    share = mine.clone().requires_grad_()
    out = norm(share)
    (out**3).sum().mul(ranks.world / len(x)).backward()
    grads = norm.weight.grad.clone()
    dist.all_reduce(grads)
    return {
        "out": out.detach(),
        "grad": share.grad / ranks.world,
        "weight": grads / ranks.world,
        "mean": norm.running_mean,
    }


def rank(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    archive = Path(folder) / "blobs.npz"
    os.environ["LOCAL_RANK"] = str(index)
    found_before = energy.find_counters
    energy.find_counters = lambda device, host: ([Counting()], "") if host else found_before(device, host=False)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=index, world_size=2)
    found: dict[str, Any] = {"calls": counted_step(archive), "run": trained(archive)}
    found["parts"] = trained(archive, accumulate=2, **LINEAR)
    found["shut"] = step_with_shut_images(slice(8) if index == 0 else slice(8, 16))
    found["broken"] = broken_step(index)
    too_small = dataclasses.replace(CONFIG, batch_size=3)
    gates = gatedconv.gates(still_network("both"))
    masks = {name: torch.ones(gate.num_gates, dtype=torch.bool) for name, gate in gates.items()}
    masks["layer2.0.layer_gate"][0] = index == 0
    for name, call in (
        ("freeze", lambda: gatedconv.freeze(still_network("both"), masks=masks)),
        ("masks", lambda: require_same_masks(masks, "here")),
        ("small", lambda: list(train(still_network("both"), load_data(f"npz:{archive}"), too_small))),
    ):
        try:
            call()
        except ValueError as error:
            found[name] = str(error)
    found["norm"] = norm_of_the_whole(torch.arange(32.0).view(8, 4).sin())
    torch.save(found, f"{folder}/rank{index}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    folder = tmp_path_factory.mktemp("ranks")
    archive = write_npz(folder / "blobs.npz")
    run_ranks(rank, str(folder))
    return [torch.load(folder / f"rank{i}.pt") for i in range(2)], archive


@pytest.mark.filterwarnings("ignore:freeze")
def test_two_ranks_train_the_network_that_one_trains(both: tuple[list[dict[str, Any]], Path]) -> None:
    ranks, archive = both
    whole = trained(archive)
    for found in (part["run"] for part in ranks):
        for key, value in whole["weights"].items():
            assert_close(found["weights"][key], value, algorithm="gradient", name=key)
        for line, expected in zip(found["metrics"], whole["metrics"], strict=True):
            for field in expected.keys() - {
                "seconds",
                "core_seconds",
                "energy_j",
                "energy_reason",
                "energy_source",
                "gate_open_rates",
            }:
                wanted = expected[field]
                assert line[field] == (wanted if isinstance(wanted, str) else near(wanted, algorithm="metrics")), field
            assert line["gate_open_rates"] == in_decimals(expected["gate_open_rates"], 5, sides=2)
        for gate, mask in whole["masks"].items():
            assert torch.equal(found["masks"][gate], mask)
            torch.testing.assert_close(found["rates"][gate], whole["rates"][gate])


@pytest.mark.filterwarnings("ignore:freeze")
def test_the_parts_of_two_ranks_train_the_network_that_one_trains_immediate(
    both: tuple[list[dict[str, Any]], Path],
) -> None:
    """Its weights; running statistics move with every part."""
    ranks, archive = both
    whole, names = trained(archive, **LINEAR), [name for name, _ in still_network("both").named_parameters()]
    for found in (part["parts"] for part in ranks):
        for name in names:
            assert_close(found["weights"][name], whole["weights"][name], algorithm="gradient", name=name)


def test_a_rank_that_leaves_out_a_block_alone_changes_nothing(both: tuple[list[dict[str, Any]], Path]) -> None:
    whole = step_with_shut_images(slice(16))
    first, second = (found["shut"] for found in both[0])
    assert first["saved"] > 0 == second["saved"] == whole["saved"]
    for found in (first, second):
        for name, weight in whole["weights"].items():
            assert_close(found["weights"][name], weight, algorithm="gradient", name=name)


def test_the_gates_of_a_step_take_one_message_and_one_backward(both: tuple[list[dict[str, Any]], Path]) -> None:
    """48 open rates, 3 of layers, and the batch's size; then their gradient."""
    gates = sum(gate.num_gates for gate in gatedconv.gates(still_network("both")).values())
    for found in both[0]:
        assert found["calls"] == [f"{gates + 1} x torch.float32", f"{gates} x torch.float32"]


def test_energy_is_that_of_the_process_that_counts_its_machine(both: tuple[list[dict[str, Any]], Path]) -> None:
    """The second process of a machine without GPUs has nothing to count; that is no reason to report nothing."""
    joules = [[line["energy_j"] for line in found["run"]["metrics"]] for found in both[0]]
    assert joules[0] == joules[1] and all(each is not None and each > 0 for each in joules[0])


def test_ranks_agree_on_a_step_that_is_bad_for_one_of_them(both: tuple[list[dict[str, Any]], Path]) -> None:
    for found in both[0]:
        assert found["broken"] == [True, 1]


def test_masks_that_differ_are_an_error_on_every_rank(both: tuple[list[dict[str, Any]], Path]) -> None:
    for found in both[0]:
        assert (
            "expected the same masks on all 2 ranks" in found["freeze"] and "'layer2.0.layer_gate'" in found["freeze"]
        )
        assert found["masks"].startswith("here: ") and "layer1.0" not in found["masks"]


def test_a_batch_too_small_for_the_processes_is_refused(both: tuple[list[dict[str, Any]], Path]) -> None:
    assert "batch_size: expected at least 4, 2 images for each of 2 processes, got 3" in both[0][0]["small"]


def test_a_synchronized_norm_is_that_of_the_joined_batch(both: tuple[list[dict[str, Any]], Path]) -> None:
    x = torch.arange(32.0).view(8, 4).sin()
    norm = torch.nn.BatchNorm1d(4)
    whole = x.clone().requires_grad_()
    out = norm(whole)
    (out**3).sum().div(8).backward()
    first, second = (found["norm"] for found in both[0])
    assert_close(torch.cat([first["out"], second["out"]]), out, algorithm="gradient")
    assert_close(torch.cat([first["grad"], second["grad"]]), whole.grad, algorithm="training")
    for found in (first, second):
        assert_close(found["weight"], norm.weight.grad, algorithm="gradient")
        assert_close(found["mean"], norm.running_mean, algorithm="gradient")


MEETING = """
import os, signal, sys
import torch
from gatedconv.train.distributed import process_group
with process_group("cpu") as ranks:
    total = ranks.sum(torch.ones(1) * (ranks.rank + 1)).item()
    if sys.argv[2] == "lose" and ranks.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    with open(f"{sys.argv[1]}/rank{ranks.rank}", "w") as file:
        print(ranks.world, total, os.environ["TORCHELASTIC_RESTART_COUNT"], file=file)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["meet", "lose"])
def test_processes_that_torchrun_starts_and_restarts_join(tmp_path: Path, kind: str) -> None:
    """With `init_process_group` alone, processes of a restart hang (PyTorch 2.14.1)."""
    script = tmp_path / "meet.py"
    script.write_text(MEETING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    done = subprocess.run([*command, str(script), str(tmp_path), kind], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [(tmp_path / f"rank{rank}").read_text().split() for rank in range(2)]
    assert found == [["2", "3.0", "1" if kind == "lose" else "0"]] * 2


@pytest.mark.slow
def test_a_lost_process_is_started_again_and_the_run_ends_the_same(tmp_path: Path) -> None:
    """Torchrun starts the job anew when the second process kills itself; it continues from the checkpoint."""
    archive = write_npz(tmp_path / "blobs.npz")
    script = tmp_path / "job.py"
    script.write_text(
        "import os, signal, sys\n"
        "import gatedconv.train.loop as loop\n"
        "from gatedconv.cli import main\n"
        "real = loop.Training._evaluated\n"
        "def evaluated(self, epoch):\n"
        "    if sys.argv[2] == 'lose' and epoch == 1 and os.environ['RANK'] == '1' and \\\n"
        "            os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(self, epoch)\n"
        "loop.Training._evaluated = evaluated\n"
        f"sys.exit(main(['train', '--data', 'npz:{archive}', '--folder', sys.argv[1], '--epochs', '3',\n"
        "    '--batch-size', '16', '--no-latency', '--device', 'cpu', '--threads', '1', '--position', 'middle',\n"
        "    '--gate', 'channel', '--mac-weight', '1', '--sync-norm', 'gates']))\n"
    )
    ends = []
    for kind in ("lose", "whole"):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            "--max-restarts=3",
        ]
        done = subprocess.run(
            [*command, str(script), str(tmp_path / kind), kind], capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stderr[-3000:]
        folder = RunFolder(tmp_path / kind)
        ends.append((folder.read_summary(), folder.read_metrics(), gatedconv.load(folder.model("gated")).state_dict()))
    (lost, lost_lines, lost_weights), (whole, lines, weights) = ends
    assert [line.epoch for line in lost_lines] == [line.epoch for line in lines] == [1, 2, 3]
    for name, value in weights.items():
        assert_close(lost_weights[name], value, algorithm="gradient", name=name)
    assert lost["frozen"]["macs"] == whole["frozen"]["macs"]
