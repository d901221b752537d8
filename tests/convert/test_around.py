"""What people put around a network: torch.compile, DistributedDataParallel, dtypes, copies."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gatedconv
from tests.convert.networks import IMAGES, network
from tests.tolerances import assert_close


@functools.cache
def converted(name, gate, dtype):
    model = network(name).to(dtype)
    return model, gatedconv.gate_model(model, gate, example_input=IMAGES.to(dtype))


def gated(name="residual", gate="both", dtype=torch.float32):
    """A network and the same with gates, which the caller may change."""
    return copy.deepcopy(converted(name, gate, dtype))


def step(model, images=IMAGES):
    """Gradients by name after one loss of the task and the method."""
    model.zero_grad()
    loss = model(images).square().mean() + gatedconv.polarization_loss(model) + gatedconv.mac_target_loss(model)
    loss.backward()
    return {n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("first", ["dense", "gated"])
def test_compiled_models_of_one_class_are_told_apart_by_their_gates(first):
    torch._dynamo.reset()
    model, result = gated("channels_last")
    models = {"dense": torch.compile(model, backend="eager"), "gated": torch.compile(result, backend="eager")}
    for name in (first, "gated", "dense", "gated"):
        models[name](IMAGES)
    masks = {n: torch.zeros(g.num_gates, dtype=torch.bool) for n, g in gatedconv.gates(result).items()}
    frozen = gatedconv.freeze(result, masks=masks)
    with torch.no_grad():
        found = torch.compile(frozen, backend="eager")(IMAGES)
        assert_close(found, frozen(IMAGES))
        assert float((found - model(IMAGES)).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("name", "backend"),  # slow: the pairs that bring no network and no compiler of their own
    [
        ("residual", "eager"),
        ("channels_last", "aot_eager"),
        ("unet", "aot_eager"),
        pytest.param("residual", "aot_eager", marks=pytest.mark.slow),
        pytest.param("channels_last", "eager", marks=pytest.mark.slow),
        pytest.param("unet", "eager", marks=pytest.mark.slow),
    ],
)
def test_a_gated_network_compiles_into_one_graph(name, backend):
    torch._dynamo.reset()
    model, result = gated(name)
    torch.compile(model, backend=backend, fullgraph=True)(IMAGES)  # what the dense network allows
    compiled = torch.compile(result, backend=backend, fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(IMAGES), model(IMAGES))
    result.train()
    expected = copy.deepcopy(result)
    found, wanted = compiled(IMAGES), expected(IMAGES)
    assert_close(found, wanted)
    found.square().mean().backward()
    wanted.square().mean().backward()
    for (path, mine), theirs in zip(result.named_parameters(), expected.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), path
        if mine.grad is not None and float(theirs.grad.abs().max()) > 1e-6:
            assert_close(mine.grad, theirs.grad)


def test_distributed_training_of_one_process_is_plain_training(tmp_path):
    model, result = gated()
    expected = step(copy.deepcopy(result).train())
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        found = step(DistributedDataParallel(result.train()))
    finally:
        dist.destroy_process_group()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_gated_network_moves_to_another_type(dtype):
    model, result = gated()
    with torch.no_grad():
        found = result.to(dtype)(IMAGES.to(dtype))
        assert found.dtype == dtype
        assert torch.equal(found, model.to(dtype)(IMAGES.to(dtype)))
    assert all(g.fc2.weight.dtype == dtype for g in gatedconv.gates(result).values())


@pytest.mark.parametrize("kind", ["learning", "frozen", "compact"])
def test_copies_and_pickles_train_as_the_original(kind):
    _, result = gated()
    if kind != "learning":
        masks = {n: torch.arange(g.num_gates) % 3 != 1 for n, g in gatedconv.gates(result).items()}
        result = gatedconv.freeze(result, masks=masks)
    if kind == "compact":
        result = gatedconv.compact(result, IMAGES)
    copies = copy.deepcopy(result), pickle.loads(pickle.dumps(result))
    result.train()(IMAGES).square().mean().backward()
    for other in copies:
        other.train()(IMAGES).square().mean().backward()
        for mine, theirs in zip(result.parameters(), other.parameters(), strict=True):
            assert (mine.grad is None) == (theirs.grad is None)
            assert mine.grad is None or torch.equal(mine.grad, theirs.grad)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_a_wrapped_network_is_unwrapped(wrap):
    model = network("residual")
    result = gatedconv.gate_model(wrap(model), "both", example_input=IMAGES)
    assert type(result) is type(model)
    with torch.no_grad():
        assert torch.equal(result(IMAGES), model(IMAGES))


class Norms(nn.Module):
    """Weights that hooks or parametrizations compute, between layers that become smaller."""

    def __init__(self, normalize):
        super().__init__()
        self.a, self.n = normalize(nn.Conv2d(3, 16, 3, padding=1)), nn.BatchNorm2d(16)
        self.b, self.c = normalize(nn.Conv2d(16, 16, 3, padding=1)), nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = torch.relu(self.b(torch.relu(self.n(self.a(x)))))
        self.features = torch.relu(self.c(x))
        return self.fc(self.features.mean((2, 3)))


@pytest.mark.parametrize(
    "normalize",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
    ],
)
def test_computed_weights_survive_a_training_step_and_copies_of_the_compact_network(normalize):
    torch.manual_seed(0)
    model = Norms(normalize)
    model(IMAGES).mean().backward()  # leaves tensors with a graph behind, which deepcopy refuses
    result = gatedconv.gate_model(model.eval(), "channel", example_input=IMAGES)
    step(result.train())
    masks = {n: torch.arange(g.num_gates) % 2 == 0 for n, g in gatedconv.gates(result).items()}
    frozen = gatedconv.freeze(result.eval(), masks=masks)
    small = gatedconv.compact(frozen, IMAGES)
    with torch.no_grad():
        for found in (small, copy.deepcopy(small), gatedconv.Engine(small, IMAGES)):
            assert_close(found(IMAGES), frozen(IMAGES))


def test_what_is_made_in_inference_mode_can_be_trained():
    with torch.inference_mode():
        gated = gatedconv.gate_model(network("residual"), "both", example_input=IMAGES.clone())
        masks = {n: torch.ones(g.num_gates, dtype=torch.bool) for n, g in gatedconv.gates(gated).items()}
        frozen = gatedconv.freeze(gated, masks=masks)
        small = gatedconv.compact(frozen, IMAGES.clone())
        expected = frozen(IMAGES)
        assert_close(gatedconv.Engine(small, IMAGES.clone())(IMAGES), expected)
    assert not gated.conversion.note
    for model in (gated, frozen, small):
        model.train()(IMAGES).square().mean().backward()
