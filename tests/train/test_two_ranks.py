"""What two processes work out together after training and in the gates' norms is what one works out alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional

from gatedconv.data import EvalBatches, ImageData, load_data
from gatedconv.gating import fisher_information, mean_logits
from gatedconv.gating.collectives import synchronized_norm
from gatedconv.models.resnet import ResNet
from gatedconv.train import Callback, RunFolder, TrainConfig
from gatedconv.train.distributed import SINGLE, Ranks, current
from gatedconv.train.recipe import train_batches
from gatedconv.train.trainer import Trainer
from tests.image_files import write_npz
from tests.processes import run_ranks
from tests.tolerances import UNEVEN_SHARES, assert_close
from tests.train.still_norms import still_network

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")
CONFIG = TrainConfig(
    batch_size=15,
    gate="channel",
    position="middle",
    consensus_by="logit",
    device="cpu",
    augment=False,
    bn_reestimate=False,
)


def small_spread() -> tuple[torch.Tensor, torch.Tensor]:
    """(128, 4) of std 0.02 around 50, and weights for a loss."""
    draw = torch.Generator().manual_seed(3)
    return 50 + 0.02 * torch.randn(128, 4, generator=draw), torch.randn(128, 4, generator=draw)


def decided(data: ImageData, folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Scores and masks by logits and by Fisher information, and the figures of the consensus."""
    model = still_network("channel")
    share = EvalBatches(data, "train", batch_size=10, rank=ranks.rank, world=ranks.world)
    found: dict[str, Any] = {
        "logit": mean_logits(model, share),
        "fisher": fisher_information(model, train_batches(CONFIG, data, ranks=ranks), functional.cross_entropy),
    }
    asked: list[int] = []
    model.register_forward_hook(lambda module, inputs, output: asked.append(len(inputs[0])))
    for by in ("logit", "fisher"):
        config = dataclasses.replace(CONFIG, consensus_by=by)
        trainer = Trainer(config, data, RunFolder(folder), Callback(), ranks)
        found[f"{by} masks"] = trainer._ranked_masks(model)
    asked.clear()
    Trainer(CONFIG, data, RunFolder(folder), Callback(), ranks).consensus(model)
    return {**found, "asked": sum(asked)}


def re_estimated(data: ImageData, folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Statistics of a network, re-estimated, and the images that this process has passed through it."""
    torch.manual_seed(1)
    model, seen = ResNet(8, 3, None, input_size=(1, 8, 8)), []
    model.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    config = dataclasses.replace(CONFIG, bn_reestimate=True)
    Trainer(config, data, RunFolder(folder), Callback(), ranks)._re_estimate(model)
    return {"images": sum(seen), "mean": model.bn1.running_mean, "var": model.bn1.running_var}


def rank(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=index, world_size=2)
    found = decided(load_data(f"npz:{folder}/blobs.npz"), Path(folder) / "two", current())
    found["re-estimated"] = re_estimated(load_data(f"npz:{folder}/blobs.npz"), Path(folder) / "two", current())
    x, slope = (each[:50] if index == 0 else each[50:] for each in small_spread())
    norm = synchronized_norm(torch.nn.BatchNorm1d(4))
    x = x.clone().requires_grad_()
    out = norm(x)
    (out * slope).sum().backward()
    found["norm"] = {"out": out.detach(), "grad": x.grad, "mean": norm.running_mean, "var": norm.running_var}
    torch.save(found, f"{folder}/rank{index}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    folder = tmp_path_factory.mktemp("ranks")
    write_npz(folder / "blobs.npz")
    run_ranks(rank, str(folder))
    return [torch.load(folder / f"rank{i}.pt") for i in range(2)], folder


@pytest.mark.filterwarnings("ignore:freeze")
def test_each_process_votes_on_its_share_and_all_decide_alike(both: tuple[list[dict[str, Any]], Path]) -> None:
    """While one passes over everything the others would wait in a collective, whose patience ends."""
    ranks, folder = both
    whole = decided(load_data(f"npz:{folder / 'blobs.npz'}"), folder / "one", SINGLE)
    for found in ranks:
        assert found["asked"] < 0.6 * whole["asked"]
        for by in ("logit", "fisher"):
            for name, value in whole[by].items():
                assert_close(found[by][name], value, dtype=torch.float32, algorithm="gradient", name=name)
            assert all(torch.equal(mask, whole[f"{by} masks"][name]) for name, mask in found[f"{by} masks"].items())
    one, two = (RunFolder(folder / name).consensus.read_text() for name in ("one", "two"))
    assert one == two


def test_each_process_re_estimates_over_its_share(both: tuple[list[dict[str, Any]], Path]) -> None:
    """The mean over processes of means over batches is the mean over images; shares differ by an image of 15."""
    ranks, folder = both
    alone = re_estimated(load_data(f"npz:{folder / 'blobs.npz'}"), folder / "one", SINGLE)
    first, second = (found["re-estimated"] for found in ranks)
    assert alone["images"] == 45 and (first["images"], second["images"]) == (21, 24)
    for name in ("mean", "var"):
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], alone[name], **UNEVEN_SHARES)


def test_a_synchronized_norm_keeps_a_small_spread_around_a_large_mean(both: tuple[list[dict[str, Any]], Path]) -> None:
    """Squares around 2,500 leave fp32 no digits of a variance of 4e-4. In fp64, by the definition of the variance."""
    values, slope = (each.double() for each in small_spread())
    x = values.requires_grad_()
    var = x.var(dim=0, unbiased=False)
    out = (x - x.mean(dim=0)) / (var + 1e-5).sqrt()
    (out * slope).sum().backward()
    found = [each["norm"] for each in both[0]]
    assert_close(torch.cat([each["out"] for each in found]), out)
    assert_close(torch.cat([each["grad"] for each in found]), x.grad, algorithm="gradient")
    for each in found:
        assert_close(each["mean"], 0.1 * x.mean(dim=0))
        unbiased = x.var(dim=0)
        # The buffer is a sum of fp32 near 0.9.
        assert_close((each["var"].double() - 0.9) / 0.1, unbiased, dtype=torch.float32, terms=1, scale=9.0)
