"""Stage ``check-train``: a whole training on this device, held against what it has to agree with.

Two epochs of a small network whose gates are shut by rank, a consensus after the first. Whatever a device adds up in
another order every time moves the result a little, and training enlarges it; so two things are called the same where
they differ by at most ten times what doing one of them twice makes a difference, or by not one bit where that is none.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.gpu import keep, packs, rows
from benchmarks.gpu.preflight import require_all
from benchmarks.gpu.session import Session
from benchmarks.gpu.stages import Case, stage
from gatedconv.deploy import compact, freeze, load
from gatedconv.measure.macs import count_macs
from gatedconv.train.build import build_model, load_images
from gatedconv.train.captured import CapturedStepper, make_stepper
from gatedconv.train.config import TrainConfig
from gatedconv.train.finish import example_images
from gatedconv.train.folder import RunFolder
from gatedconv.train.listener import Listener
from gatedconv.train.loop import StepReport
from gatedconv.train.masks import read_consensus
from gatedconv.train.pipeline import run
from gatedconv.train.recipe import place
from gatedconv.train.stopping import StopRequest
from reproduce.ledger import append_row
from reproduce.runner import training_row
from reproduce.table import Experiment

DRIFTS = 10.0
STEPS = 6  # of which a captured step is replayed for three
STEPS_LR = 1e-3  # so low that six steps do not enlarge what is rounded another way
STEPS_DRIFT = 1e-5  # relative, and at least: kernels that are made another way round another way
CUT_ERROR = 1e-4  # of a cut network against the frozen one, relative: the same sums in another order
_RECIPE: dict[str, Any] = {
    "model": "resnet20", "gate": "channel", "position": "middle", "epochs": 2, "lr": 0.05, "mac_control": "rank",
    "mac_ramp": (0.02, 0.35), "mac_target": 0.5, "consensus_at": 0.5, "teacher_at": 0.02, "amp": "off",
    "gate_lr_factor": 0.1,  # so few steps of so high a rate would shut gates that the ranks leave open
}  # fmt: skip


@stage("check-train")
def check_train(session: Session) -> Iterator[Case]:
    """Each case trains what it needs that no case before it has."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), session.dry)
        cases: dict[str, tuple[float, Callable[[], str]]] = {
            "packages": (30.0, bench.packages),
            "interrupted and resumed": (120.0, bench.resumed),
            "cut": (60.0, bench.cut),
            "evaluation": (60.0, bench.evaluation),
            "ledger and archives": (60.0, bench.ledger),
            "captured step": (60.0, bench.captured),
            "compiled step": (150.0, bench.compiled),
        }
        for name, (seconds, function) in cases.items():
            yield Case(("train", name, bench.config.batch_size, "float32", "gatedconv"), seconds, _noted(function))


def _noted(function: Callable[[], str]) -> Callable[[], dict[str, Any]]:
    return lambda: {"note": function()}


class Bench:
    """Images, a recipe for this device, and the runs that several cases look at.

    Args:
        folder: for all of it.
        dry: on a CPU, as small as can be.
    """

    def __init__(self, folder: Path, dry: bool) -> None:
        self.folder, self.dry = folder, dry
        self.device = "cpu" if dry else "cuda"
        side, count, batch = (8, 192, 8) if dry else (32, 4096, 64)  # gates are shut every 20 steps
        self.config = TrainConfig(
            **_RECIPE, data=f"npz:{_images(folder, count, side)}", batch_size=batch, device=self.device,
            threads=1 if dry else 0, latency=not dry,
        )  # fmt: skip
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

    def straight(self, number: int = 0) -> RunFolder:
        """A run that nothing interrupts."""
        folder = RunFolder(self.folder / "runs" / f"straight-seed{number}")
        if not folder.summary.is_file():
            run(self.config, folder)
        return folder

    def packages(self) -> str:
        """All that a run imports at any time is here."""
        require_all(self.device)
        return "passed"

    def resumed(self) -> str:
        """A run that is stopped within an epoch, before the consensus and after it, and goes on from archives."""
        folder = RunFolder(self.folder / "first" / "runs" / "pieces-seed0")
        for phase in ("gated", "cut"):
            if run(self.config, folder, resume=folder.holds_run(), **_stopping(phase)) is not None:
                raise RuntimeError(f"the run was not stopped in phase {phase!r}")
            folder = self._moved(folder, self.folder / f"after-{phase}")
        if run(self.config, folder, resume=True) is None:
            raise RuntimeError("the run did not come to its end")
        drift = difference(self.straight(0), self.straight(1))
        return require_same(difference(self.straight(0), folder), drift)

    def _moved(self, folder: RunFolder, work: Path) -> RunFolder:
        """The run in another work folder, where its archives have brought it."""
        out, before = work / "packs", folder.path.parent.parent
        packs.write_packs(out, keep.groups(before, {}), packs.Limits(), before)
        pieces, notes = packs.read_packs(packs.find_packs([out])[0])
        if notes:
            raise RuntimeError(f"archives bring back less: {notes}")
        keep.unpacked(work, pieces.values())
        return RunFolder(work / "runs" / folder.path.name)

    def cut(self) -> str:
        """What is cut computes what is frozen, with the MACs that were asked for."""
        folder = self.straight()
        masks = read_consensus(folder.consensus)[0].masks
        images = example_images(load_images(self.config), self.config, 32)
        frozen = place(freeze(self._loaded(folder, "gated"), masks=masks), self.config).eval()
        small = compact(frozen, images[:1], channel_multiple=1).eval()  # as the run does
        with torch.no_grad():
            expected, found = frozen(images), small(images)
        error = float((found - expected).abs().max() / expected.abs().max())
        if not error <= CUT_ERROR:
            raise RuntimeError(f"the cut network is off by {error:.1e} of its largest output")
        summary = folder.read_summary()
        share = summary["frozen"]["macs"] / summary["macs_dense"]
        if count_macs(small, images[:1]) != summary["frozen"]["macs"] or abs(share - self.config.mac_target) > 0.05:
            raise RuntimeError(f"{share:.1%} of the MACs are left, {self.config.mac_target:.0%} were asked for")
        return f"passed: off by {error:.1e}, {share:.1%} of the MACs"

    def evaluation(self) -> str:
        """The top-1 that a run tells is that of its saved network, asked on a CPU, from the images as they are."""
        folder = self.straight()
        data = load_images(self.config)
        net = self._loaded(folder, "compact").cpu().eval()
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (data.mean, data.std))
        assert isinstance(data.test_images, Tensor)
        with torch.no_grad():
            logits = torch.cat([net((part / 255 - mean) / std) for part in data.test_images.float().split(256)])
        right = int((logits.argmax(1) == data.test_labels).sum())
        told = folder.read_summary()["frozen"]["top1"]
        count = len(data.test_labels)
        close = int((logits.topk(2).values.diff().abs() < 1e-3).sum())  # may fall to either side elsewhere
        if abs(told * count / 100 - right) > close + 0.01:
            raise RuntimeError(f"the run tells {told:.2f} %, a CPU {100 * right / count:.2f} %")
        return f"passed: {told:.2f} % of {count} images"

    def ledger(self) -> str:
        """The run gives a row, which comes back out of archives together with what goes on from it."""
        folder, ledger = self.straight(), self.folder / rows.LEDGER
        recipe = {name: value for name, value in _RECIPE.items()} | {"data": self.config.data}
        experiment = Experiment("straight", "gated", settings=recipe)
        row = training_row(experiment, 0, folder, folder.read_summary(), {})
        ledger.unlink(missing_ok=True)
        append_row(ledger, row)
        out = self.folder / "packs"
        left_out = packs.write_packs(out, keep.groups(self.folder, {}), packs.Limits(), self.folder)
        pieces, notes = packs.read_packs(packs.find_packs([out])[0])
        if rows.rows_of(pieces, out) != {row.key: row} or left_out or notes:
            raise RuntimeError(f"archives bring back something else: {left_out} {notes}")
        return f"passed: top-1 {row.top1_last:.2f} %, {row.macs / row.macs_dense:.1%} of the MACs, on {row.device}"

    def captured(self) -> str:
        """Steps replayed as a CUDA graph; dry, the function that would be captured."""
        kind = partial(CapturedStepper, capture=False) if self.dry else make_stepper
        return self._steps_agree({} if self.dry else {"cuda_graph": True}, kind)

    def compiled(self) -> str:
        """Steps of the compiled network; dry, without the compiler's backend."""
        backend = mock.patch("torch.compile", partial(torch.compile, backend="eager")) if self.dry else nullcontext()
        with backend:
            return self._steps_agree({"compile": True}, make_stepper)

    def _steps_agree(self, changes: dict[str, Any], kind: Callable[..., Any]) -> str:
        plain = _changed(self.config, skip_blocks=False, lr=STEPS_LR)
        first, second = (self._steps(plain, make_stepper) for _ in range(2))
        if parameters_differ(self._start(plain).state_dict(), first) < 100 * STEPS_DRIFT:
            raise RuntimeError("the steps moved next to nothing")
        drift = max(parameters_differ(first, second), STEPS_DRIFT)
        return require_same(parameters_differ(first, self._steps(_changed(plain, **changes), kind)), drift)

    def _start(self, config: TrainConfig) -> nn.Module:
        return place(build_model(config, load_images(config)), config).train()

    def _steps(self, config: TrainConfig, kind: Callable[..., Any]) -> dict[str, Tensor]:
        """The network after some steps."""
        model = self._start(config)
        stepper = kind(model, config, torch.device(self.device))
        draw = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        shape = load_images(config).image_shape
        with stepper.active():
            for step in range(STEPS):
                images = torch.randn(config.batch_size, *shape, generator=draw).to(self.device)
                images = images.contiguous(memory_format=torch.channels_last) if config.channels_last else images
                labels = torch.randint(3, (config.batch_size,), generator=draw).to(self.device)
                stepper(images, labels, step / STEPS)
                stepper.guard.settle()
        return {name: value.detach().cpu() for name, value in model.state_dict().items()}

    def _loaded(self, folder: RunFolder, kind: str) -> nn.Module:
        return load(folder.model(kind))


def _changed(config: TrainConfig, **changes: Any) -> TrainConfig:
    return TrainConfig(**(vars(config) | changes))


def _images(folder: Path, count: int, side: int) -> Path:
    """An archive of three classes of noise with a bright row, whose place is the label."""
    random, arrays = np.random.default_rng(0), {}
    for split, images in (("train", count), ("test", count // 2)):
        labels = np.arange(images) % 3
        pixels = random.integers(0, 120, (images, side, side, 3), dtype=np.uint8)
        pixels[np.arange(images), labels * side // 3] += 100
        arrays |= {f"{split}_images": pixels, f"{split}_labels": labels}
    path = folder / "rows.npz"
    np.savez(path, **arrays)
    return path


def _stopping(phase: str) -> dict[str, Any]:
    """Arguments of `run` that stop it as soon as it tells of a step of a phase."""
    stop = StopRequest()

    class Stopping(Listener):
        def step(self, report: StepReport) -> None:
            if report.phase == phase:
                stop.make()

    return {"listener": Stopping(), "stop": stop}


def difference(one: RunFolder, other: RunFolder) -> float:
    """The largest difference of two finished runs: weights and epochs, relative; infinite for other gates."""
    if read_masks(one) != read_masks(other):
        return float("inf")
    found = [parameters_differ(load(a).state_dict(), load(b).state_dict()) for a, b in _models(one, other)]
    for mine, theirs in zip(one.read_metrics(), other.read_metrics(), strict=True):
        found += [abs(mine.train_loss - theirs.train_loss) / abs(theirs.train_loss), abs(mine.macs - theirs.macs)]
        if (mine.phase, mine.epoch, mine.lr) != (theirs.phase, theirs.epoch, theirs.lr):
            return float("inf")
    return max(found)


def _models(one: RunFolder, other: RunFolder) -> list[tuple[Path, Path]]:
    return [(one.model(kind), other.model(kind)) for kind in ("gated", "compact")]


def read_masks(folder: RunFolder) -> Any:
    """What the gates of a run agreed on."""
    return json.loads(folder.consensus.read_text())["masks"]


def parameters_differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of two networks' tensors, each relative to its largest number."""
    if {name: value.shape for name, value in one.items()} != {name: value.shape for name, value in other.items()}:
        return float("inf")
    found = [0.0]
    for name, value in one.items():
        mine, theirs = value.double().cpu(), other[name].double().cpu()
        if value.numel() and not torch.equal(mine, theirs):
            found.append(float((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)))
    return max(found)


def require_same(found: float, drift: float) -> str:
    """A line that says how far apart two things are; RuntimeError where that is too far, see above."""
    if not found <= DRIFTS * drift or drift == float("inf"):
        raise RuntimeError(f"off by {found:.1e}, where doing it twice differs by {drift:.1e}")
    return "passed: equal, bit by bit" if found == 0 else f"passed: off by {found:.1e}, twice the same by {drift:.1e}"
