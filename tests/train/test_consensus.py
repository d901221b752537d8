"""A consensus within the run: training continues with the compact network, resumed runs keep it, controls train."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import gatedconv
from gatedconv.train import Callback, RunFolder, TrainConfig, run, trainer
from gatedconv.train.build import build_model, even_masks, load_images, starting_network
from gatedconv.train.checkpoint import read_consensus, write_consensus


@pytest.fixture(autouse=True)
def no_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gatedconv.train.trainer.write_exports", lambda *_: [])


def early(archive: Path, **changes: Any) -> TrainConfig:
    settings = {
        "data": f"npz:{archive}",
        "epochs": 4,
        "batch_size": 16,
        "gate": "channel",
        "position": "middle",
        "device": "cpu",
        "mac_control": "rank",
        "mac_ramp": (0.0, 0.3),
        "consensus_at": 0.5,
        "consensus_by": "logit",
        "latency": False,
        "polar_schedule": "constant",
    }
    return TrainConfig(**(settings | changes))


def test_what_is_left_trains_on_and_lands_on_the_target(tmp_path: Path, archive: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    summary = run(early(archive), folder)
    assert summary is not None and summary["epochs"] == {"gated": 2, "compact": 2}
    lines = folder.read_metrics()
    assert [(line.phase, line.epoch) for line in lines] == [("gated", 1), ("gated", 2), ("compact", 3), ("compact", 4)]
    assert lines[1].lr > lines[2].lr > lines[3].lr  # one schedule over the whole run
    assert lines[1].macs is not None and lines[1].macs < 1 and lines[2].macs is lines[2].open_rate is None
    assert summary["frozen"]["macs"] == pytest.approx(0.5 * summary["macs_dense"], rel=0.01)
    small, gated = gatedconv.load(folder.model("compact")), gatedconv.load(folder.model("gated"))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in gated.parameters())
    # It has been trained since it was compacted.
    consensus, figures = read_consensus(folder.consensus)
    untrained = gatedconv.compact(gatedconv.freeze(gated, masks=consensus.masks).eval(), torch.zeros(1, 1, 8, 8))
    assert not torch.equal(untrained.conv1.weight, small.conv1.weight)
    assert untrained.state_dict().keys() == small.state_dict().keys()
    assert figures["agreement"] == summary["agreement"]
    # Of the network that is left, not of the samples' open rates; a BatchNorm whose channels are all closed goes, too.
    dense = sum(p.numel() for p in build_model(early(archive), load_images(early(archive)), gated=False).parameters())
    assert summary["pruning_rate"] == pytest.approx(1 - summary["frozen"]["params"] / dense, abs=1e-3)


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_resumed_run_ends_like_one_that_was_not_interrupted(tmp_path: Path, archive: Path, stop_after: int) -> None:
    whole, part = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "part")
    expected = run(early(archive), whole)

    from gatedconv.train.stopping import StopRequest

    stop = StopRequest()

    class Stopper(Callback):
        def epoch(self, metrics: Any) -> None:
            if metrics.epoch == stop_after:
                stop.requested = True

    assert run(early(archive), part, callback=Stopper(), stop=stop) is None
    found = run(early(archive), part, resume=True)
    assert expected is not None and found is not None
    for key in ("frozen", "agreement", "open_rates", "macs_dense"):
        assert found[key] == expected[key]
    for file in ("compact.safetensors", "gated.safetensors", "consensus.json"):  # the consensus is in the first, too
        assert (part.path / file).read_bytes() == (whole.path / file).read_bytes()


def test_a_sub_network_of_another_run_is_trained_from_the_start(tmp_path: Path, archive: Path) -> None:
    first = RunFolder(tmp_path / "first")
    gated = run(early(archive), first)
    alone = early(archive, consensus_at=1.0, mac_control="none", subnetwork=str(first.consensus))
    network = starting_network(alone, load_images(alone), "dense")
    dense = build_model(alone, load_images(alone), gated=False).state_dict()
    masks = read_consensus(first.consensus)[0].masks
    partly = [name.removesuffix(".channel_gate") for name, mask in masks.items() if 0 < mask.sum() < len(mask)]
    assert partly
    for block in partly:  # the same weights as the dense net begins with
        weight = network.state_dict()[f"{block}.branch.conv1.weight"]
        assert torch.equal(weight, dense[f"{block}.conv1.weight"][masks[f"{block}.channel_gate"]])
    summary = run(alone, RunFolder(tmp_path / "alone"))
    assert gated is not None and summary is not None
    assert summary["dense"]["macs"] == gated["frozen"]["macs"] and summary["epochs"] == {"dense": 4}


def test_an_even_part_has_the_same_share_of_every_gate(archive: Path) -> None:
    config = early(archive)
    model = build_model(config, load_images(config))
    shares = [float(mask.float().mean()) for mask in even_masks(model, 0.5).values()]
    assert max(shares) - min(shares) <= 0.1 and 0.4 < shares[0] < 0.6
    layers = build_model(dataclasses.replace(config, gate="layer"), load_images(config))
    opened = [bool(mask.item()) for mask in even_masks(layers, 0.5).values()]
    closed = [index for index, is_open in enumerate(opened) if not is_open]
    assert 3 <= len(closed) <= 6 and max(b - a for a, b in zip(closed, closed[1:], strict=False)) <= 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": "none"}, "mac_control: expected a gate, got gate 'none'"),
        ({"gate": "none", "mac_control": "none"}, "consensus_at: expected a gate"),
        ({"gate": "none", "mac_control": "none", "consensus_at": 1.0, "subnetwork": "even"}, "subnetwork: .* a gate"),
        ({"epochs": 1}, "consensus_at: expected at least 2 epochs"),
        ({"subnetwork": "even"}, "subnetwork: expected consensus_at 1"),
        ({"mac_weight": 1.0}, "mac_control: expected mac_weight 0"),
        ({"mac_ramp": (0.5,)}, "mac_ramp: expected two rising shares"),
        ({"mac_ramp": (0.5, 0.2)}, "mac_ramp: expected two rising shares"),
        ({"mac_ramp": (0.2, 0.6)}, "consensus_at: expected at least 0.6, where mac_ramp ends"),
        ({"mac_ramp": (0.5, 1.2)}, "mac_ramp: expected at least 0.0 and at most 1.0"),
        ({"consensus_at": 0.0}, "consensus_at: expected above 0.0"),
        ({"consensus_by": "lot"}, "consensus_by: expected one of vote, logit, fisher"),
    ],
)
def test_settings_that_cannot_be(archive: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        early(archive, **changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected the consensus of a run, found nothing there"),
        ("{", "could not read it"),
        ("[]", "expected dict, found list"),
        ('{"masks": {}}', "missing key 'figures'"),
        ('{"masks": {"layer1.0.channel_gate": "10a"}, "figures": {}}', "expected zeros and ones, found '10a'"),
        (
            '{"masks": {"a": "1"}, "figures": {"agreement": "1"}}',
            "agreement: expected int or float or NoneType, found str",
        ),
        ('{"masks": {"a": "1"}, "figures": {}, "open_rates": {"a": [1]}}', "open_rates: a: expected numbers, found"),
        ('{"masks": {"a": "1"}, "figures": {}, "open_rates": {"a": "1 x"}}', "open_rates: a: expected numbers, found"),
        ('{"masks": {"a": "1"}, "figures": {}, "open_rates": {"a": "1 0"}}', "a number for each of the masks"),
        ('{"masks": {"layer1.0.channel_gate": "101"}, "figures": {}}', "not a part of resnet20 with these gates"),
    ],
)
def test_a_sub_network_that_cannot_be_read(tmp_path: Path, archive: Path, content: str | None, message: str) -> None:
    path = tmp_path / "consensus.json"
    if content is not None:
        path.write_text(content)
    config = early(archive, consensus_at=1.0, mac_control="none", subnetwork=str(path))
    with pytest.raises(ValueError, match=message):
        run(config, RunFolder(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_consensus_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "consensus.json"
    masks = {"a": torch.tensor([True, False, True]), "b.c": torch.tensor([False])}
    rates = {"a": torch.tensor([1 / 3, 1e-9, 0.59512347]), "b.c": torch.zeros(1)}
    figures = {"agreement": 1 / 3, "gate_agreement": {"a": 0.1, "b.c": 1.0}, "open_ratio": 0.5}
    write_consensus(path, gatedconv.Consensus(masks, 1 / 3, {"a": 0.1, "b.c": 1.0}, rates), figures)
    found, told = read_consensus(path)
    assert told == figures and (found.agreement, found.gate_agreement) == (1 / 3, {"a": 0.1, "b.c": 1.0})
    for new, old in ((found.masks, masks), (found.open_rates, rates)):
        assert new.keys() == old.keys() and all(torch.equal(new[name], old[name]) for name in old)
    kept = json.loads(path.read_text())
    assert kept["masks"]["a"] == "101"
    # As they were written before open rates were kept.
    path.write_text(json.dumps({"masks": kept["masks"], "figures": {"agreement": 0.5}}))
    found, _ = read_consensus(path)
    assert (found.agreement, found.gate_agreement, found.open_rates) == (0.5, {}, {})
    assert found.masks.keys() == masks.keys() and torch.equal(found.masks["a"], masks["a"])


def test_a_compact_network_has_no_more_channels_on_a_device_that_likes_multiples(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`compact` fills channels up where its example is on a GPU; here everywhere."""
    config = early(archive, bn_reestimate=False)
    data = load_images(config)
    torch.manual_seed(0)
    gated = build_model(config, data).eval()
    masks = {name: torch.arange(gate.num_gates) % 3 == 0 for name, gate in gatedconv.gates(gated).items()}
    frozen = gatedconv.freeze(gated, masks=masks)
    compacted = trainer.Trainer(config, data, RunFolder(archive.with_name("run")), Callback()).compacted
    exact = compacted(frozen)
    assert [layer.out_channels for name, layer in exact.named_modules() if name.endswith("conv1") and "." in name] == [
        int(mask.sum()) for mask in masks.values()
    ]
    real, asked = trainer.compact, []

    def on_a_gpu(*arguments: Any, channel_multiple: int | None = None) -> torch.nn.Module:
        asked.append(channel_multiple)
        return real(*arguments, channel_multiple=8 if channel_multiple is None else channel_multiple)

    monkeypatch.setattr(trainer, "compact", on_a_gpu)
    again = compacted(frozen)
    assert asked == [1]
    assert [value.shape for value in again.state_dict().values()] == [
        value.shape for value in exact.state_dict().values()
    ]
