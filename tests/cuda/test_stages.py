"""What of the engine's stages works without a GPU: cases, work counted, goals judged, the document."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import check, engine, engine_tables
from benchmarks.gpu.engine_roofline import LAYERS, Ceilings, LayerCase
from benchmarks.gpu.session import Session
from benchmarks.gpu.timing import Machine

VERSIONS = {"torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0"}


def test_every_promised_case_is_measured_and_the_goals_come_first(tmp_path):
    session = Session("h200", VERSIONS, tmp_path)
    cases = [*engine.bench_cifar(session), *engine.bench_imagenet(session)]
    found = {(c.key[1], c.key[2], c.key[3], c.key[4]) for c in cases}
    for network, batch in engine_tables.GOALS:
        for dtype in engine.DTYPES:
            providers = set(engine.NETWORK_PROVIDERS) - (set() if "resnet56" in network else {engine.RESIDENT})
            assert {(network, batch, dtype, p) for p in providers} <= found
    assert cases[0].key[1:4] == ("resnet56 mid-50", 1, "float16")
    models = {name.split()[0] for name, *_ in found}
    assert models == {"resnet18", "resnet50", "resnet56", "resnet110"}
    assert {name.split()[0] for name, *_, provider in found if provider == engine.RESIDENT} == {"resnet56", "resnet110"}


def test_a_network_without_a_run_is_no_row_of_the_resident_driver(monkeypatch):
    class Layers(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x):
            return self.network(x)

        def describe(self):
            return "conv1 [gatedconv 1x1]"

    monkeypatch.setattr(engine, "build", lambda *arguments: Layers(arguments[3]))
    machine = Machine(dry=True)
    machine.dry, machine.clean = False, lambda: None
    case = engine.network_case(machine, engine.NetworkCase("resnet56", "mid-50", 1), "bfloat16", engine.RESIDENT)
    assert case.run() == {"note": "not run: no layers of it fit into shared memory"}


def test_work_of_a_layer():
    layer = LayerCase(16, 16, 8, 3, 32)
    assert layer.scatters and layer.name == "16->8 of 16 + stream 3x3 @32"
    assert layer.macs(2) == 2 * 1024 * 8 * 16 * 9
    assert layer.bytes(2, 2) == 2 * (2 * 1024 * (16 + 32) + 8 * 16 * 9)
    ceilings = Ceilings(dry=True)
    assert ceilings.share(layer, 2, "float16", 1.0) is None
    ceilings.per_ms = {"copy": layer.bytes(2, 2) / 0.5, "float16": 1e30, "tf32": 1e30}
    assert ceilings.share(layer, 2, "float16", 1.0) == pytest.approx(0.5)
    ceilings.per_ms |= {"float16": 2 * layer.macs(2) / 0.8}
    assert ceilings.share(layer, 2, "bfloat16", 1.0) == pytest.approx(0.8)  # the slower of the two limits


def test_the_peer_of_an_after_gated_layer_computes_what_ours_should():
    layer = next(layer for layer in LAYERS if layer.scatters)
    out = layer.build("cut cudnn", 2, torch.float32, "cpu")()
    assert out.shape == (2, layer.outputs, layer.size, layer.size) and bool((out >= 0).all())


def test_a_wrong_result_is_a_failure_and_not_a_time(monkeypatch):
    monkeypatch.setattr(engine, "build", lambda *arguments: lambda x: arguments[3](x) + 1)
    case = engine.network_case(Machine(dry=True), engine.NetworkCase("resnet56", "mid-50", 1), "bfloat16", "gatedconv")
    with pytest.raises(RuntimeError, match="twice PyTorch's own is"):
        case.run()


def test_deviation_is_a_root_mean_square_and_infinite_for_nan():
    assert engine.deviation(torch.tensor([4.0, 0.0]), torch.tensor([3.0, 0.0])) == pytest.approx(1 / 3)
    assert engine.deviation(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")


@pytest.mark.parametrize("batch,images", [(1, 64), (32, 64), (48, 96), (256, 256)])
def test_errors_are_those_of_64_images_or_more_in_batches(batch, images):
    x, sizes, memory = torch.randn(batch, 2), [], torch.empty(batch, 2)

    def run(part):
        sizes.append(len(part))
        return memory.copy_(part)  # as a graph does: the next call writes over it

    several = engine.several(x)
    assert len(several) == images and torch.equal(several[:batch], x)
    assert torch.equal(engine.batched(run, several, batch), several) and set(sizes) == {batch}


def test_the_library_is_loaded_before_the_shards_start(monkeypatch, tmp_path):
    order, session = [], Session("h200", VERSIONS, tmp_path)

    class Shard:
        def __init__(self, command, **options):
            order.append("shard")

        def wait(self):
            return 0

    monkeypatch.setattr(check.subprocess, "Popen", Shard)
    monkeypatch.setattr(check._native, "load", order.append)
    check.sharded(session)
    assert order == ["cuda"] + ["shard"] * check.SHARDS


def test_the_document_is_what_the_result_files_say():
    assert engine_tables.main(["--check"]) == 0, "run python -m benchmarks.gpu.engine_tables"


def test_cells_are_blank_until_measured_and_goals_are_judged():
    assert "| resnet56 mid-50 | 1 |  |  |  |  |  |  |  |  | (3.0) | (1.5) |" in engine_tables.engine_section([])
    rows = [
        dict(benchmark="engine network", case="resnet56 mid-50", batch=1, dtype="float16", provider=p, ms_median=ms)
        for p, ms in ((engine_tables.COMPILE, 0.4), (engine_tables.FUSED, 0.1), (engine_tables.OURS, 0.1))
    ]
    section = engine_tables.engine_section([{"device": "h200", "torch": "2.11.0", "commit": "abc", "rows": rows}])
    (line,) = (text for text in section.splitlines() if text.startswith("| resnet56 mid-50 | 1 |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[-2:] == ["4.00 (3.0, met)", "1.00 (1.5, missed)"]
