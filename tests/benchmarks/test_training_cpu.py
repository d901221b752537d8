"""The plain loop that ours is timed against does the same work, and learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import training_cpu
from benchmarks.roofline import DeviceRates
from gatedconv.data.image_data import Augment, make_image_data
from gatedconv.gating import polarization_loss
from gatedconv.measure.macs import count_macs
from gatedconv.models.resnet import ResNet
from tests.tolerances import assert_close


@pytest.mark.parametrize("depth", [8, 20])
def test_the_plain_network_is_ours(depth: int) -> None:
    """Parameters and multiply-accumulates, and with the same weights the same answers."""
    plain, ours = training_cpu.plain_resnet(depth).eval(), ResNet(depth, 10, None, input_size=(3, 16, 16)).eval()
    assert count_macs(plain, torch.zeros(1, 3, 16, 16)) == count_macs(ours, torch.zeros(1, 3, 16, 16))
    state = [value for name, value in ours.state_dict().items()]
    assert [value.shape for value in plain.state_dict().values()] == [value.shape for value in state]
    plain.load_state_dict(dict(zip(plain.state_dict(), state, strict=True)))
    x = torch.randn(2, 3, 16, 16)
    assert_close(plain(x), ours(x), algorithm="gradient")


def test_the_plain_gates_are_ours() -> None:
    """With the same weights the same answers on a training batch, gates and gradients the same."""
    plain = training_cpu.plain_resnet(8, gated=True).to(memory_format=torch.channels_last)
    ours = ResNet(8, 10, "channel", "middle", input_size=(3, 16, 16))
    theirs = dict(zip(plain.parameters(), ours.parameters(), strict=True))
    with torch.no_grad():
        for parameter, other in theirs.items():
            parameter.copy_(other)
        for gate in (module for module in plain.modules() if isinstance(module, training_cpu.PlainGate)):
            gate.fc2.bias.normal_()  # some open, some closed
        for parameter, other in theirs.items():
            other.copy_(parameter)
    x = torch.randn(6, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    answers = plain(x), ours(x)
    assert_close(*answers, algorithm="gradient")
    polar = torch.stack([m.polar for m in plain.modules() if isinstance(m, training_cpu.PlainGate)]).mean()
    (answers[0].logsumexp(1).sum() + polar).backward()
    (answers[1].logsumexp(1).sum() + polarization_loss(ours)).backward()
    for parameter, other in theirs.items():
        assert_close(parameter.grad, other.grad, algorithm="gradient", scale=0.01)  # 0 in front of a norm
    assert 0 < polar


def test_plain_batches_are_crops_and_their_mirror_images() -> None:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8, generator=draw)
    plain = training_cpu.PlainImages(images, torch.arange(6), 2)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2)).float()
    mean, std = images.float().mean((0, 2, 3)), images.float().std((0, 2, 3))
    seen = set()
    for _ in range(12):
        for x, y in plain.train_batches(3):
            assert x.is_contiguous(memory_format=torch.channels_last) and x.dtype == torch.float32
            for image, label in zip((x * std.view(1, 3, 1, 1) + mean.view(1, 3, 1, 1)).round(), y, strict=True):
                found = [
                    (top, left, mirrored)
                    for top in range(5)
                    for left in range(5)
                    for mirrored in (False, True)
                    if torch.equal(image, _crop(padded[label], top, left, mirrored))
                ]
                assert len(found) == 1
                seen.add(found[0])
    assert {place[0] for place in seen} == {place[1] for place in seen} == set(range(5))
    assert {place[2] for place in seen} == {False, True}


def _crop(image: torch.Tensor, top: int, left: int, mirrored: bool) -> torch.Tensor:
    part = image[:, top : top + 8, left : left + 8]
    return part.flip(2) if mirrored else part


def test_the_plain_loop_learns() -> None:
    labels = torch.arange(256) % 2
    images = (labels[:, None, None, None] * 60 + torch.randint(150, (256, 3, 8, 8))).to(torch.uint8)
    data = make_image_data("two", (images, labels), (images, labels), Augment())
    torch.manual_seed(0)
    epochs = training_cpu.plain_epochs(8, data, "off", False)
    assert max(next(epochs) for _ in range(12)) > 90


def test_it_writes_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = (("resnet20", 8, False, "off", False), ("resnet20", 8, True, "off", False))
    monkeypatch.setattr(training_cpu, "CASES", cases)
    monkeypatch.setattr(training_cpu, "BATCH", 8)
    monkeypatch.setattr(training_cpu, "measured_rates", lambda *_: DeviceRates(1e8, 1e7))
    before, output, shown = torch.get_num_threads(), tmp_path / "rows.json", []
    try:
        training_cpu.main(["--rounds", "2", "--steps", "2", "--threads", "1", "--out", str(output)], shown.append)
    finally:
        torch.set_num_threads(before)
    found = json.loads(output.read_text())
    assert found["rows"] == shown and "2 steps" in found["what"]
    assert [row["network"] for row in shown] == ["resnet20, 8x8", "resnet20, 8x8, gated"]
    assert ["ungated_ratio" in row for row in shown] == [False, True] and shown[1]["ungated_ratio"] > 0
    assert all(row["ours_ms"] > 0 and row["plain_ms"] > 0 and row["ratio"] > 0 < row["roofline"] for row in shown)
