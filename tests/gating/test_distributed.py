"""Two processes with half a batch each see the losses and gradients of one with the whole batch."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import gatedconv
from gatedconv.gating.collectives import synchronized_norm
from tests.processes import run_ranks
from tests.tolerances import assert_close

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
X = X + torch.linspace(-4, 4, 8)[torch.randperm(8, generator=torch.Generator().manual_seed(2)), None, None, None]
ROWS = torch.randn(7, 3, generator=torch.Generator().manual_seed(3))


def gated_model():
    torch.manual_seed(1)
    model = gatedconv.models.resnet20(gate="both", position="middle", input_size=(3, 8, 8)).train()
    for module in model.modules():  # statistics of half a batch are others than those of the whole
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    for gate in gatedconv.gates(model).values():
        torch.nn.init.normal_(gate.fc2.weight)
        torch.nn.init.normal_(gate.fc2.bias, std=0.3)
    return model


def step(model, x):
    """Loss over the images as DDP averages it, plus the gates' losses."""
    task = model(x).logsumexp(dim=1).mean()
    gates = 3 * gatedconv.polarization_loss(model) + gatedconv.activation_loss(model, weight="macs")
    loss = task + gates + gatedconv.mac_target_loss(model, 0.4)
    loss.backward()
    return gates.detach()


def rank(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=index, world_size=2)
    wrapped = DistributedDataParallel(gated_model())
    loss = step(wrapped, X[index * 4 : index * 4 + 4])
    norm = synchronized_norm(torch.nn.BatchNorm1d(3))
    norm(ROWS[:5] if index == 0 else ROWS[5:])
    torch.save(
        {
            "norm": norm.state_dict(),
            "loss": loss,
            "grads": {name: p.grad for name, p in wrapped.module.named_parameters()},
            "own": torch.cat([gate.open_rate.detach() for gate in gatedconv.gates(wrapped).values()]),
        },
        f"{folder}/rank{index}.pt",
    )
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
def test_two_ranks_equal_one_with_the_joined_batch(tmp_path: Path):
    run_ranks(rank, str(tmp_path))
    ranks = [torch.load(tmp_path / f"rank{i}.pt") for i in range(2)]
    model = gated_model()
    loss = step(copy.deepcopy(model), X)
    whole = copy.deepcopy(model)
    step(whole, X)
    assert not torch.equal(ranks[0]["own"], ranks[1]["own"])  # open_rate stays the rank's own
    norm = torch.nn.BatchNorm1d(3)
    norm(ROWS)
    for found in ranks:
        assert_close(found["norm"], dict(norm.state_dict()))  # of 5 rows and of 2
        torch.testing.assert_close(found["loss"], loss)
        for name, parameter in whole.named_parameters():
            assert_close(found["grads"][name], parameter.grad, algorithm="gradient", name=name)


def rank_re_estimates(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=index, world_size=2)
    norm = torch.nn.BatchNorm2d(3)
    batches = [X[:4], X[4:]]
    gatedconv.re_estimate_batchnorm(norm, batches if index == 0 else [X + 1])
    torch.save(norm.state_dict(), f"{folder}/rank{index}.pt")
    dist.destroy_process_group()


def test_statistics_are_estimated_again_over_the_batches_of_all_ranks(tmp_path: Path) -> None:
    run_ranks(rank_re_estimates, str(tmp_path))
    first, second = (torch.load(tmp_path / f"rank{index}.pt") for index in range(2))
    batches = [X[:4], X[4:], X + 1]
    expected = {
        "running_mean": torch.stack([x.mean((0, 2, 3)) for x in batches]).mean(0),
        "running_var": torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in batches]).mean(0),
    }
    for name, values in expected.items():
        assert_close(first[name], values)
        assert torch.equal(first[name], second[name])
    assert first["num_batches_tracked"] == 3
