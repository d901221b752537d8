"""The runtime computes the engine's bits, reports what the file has, and refuses what does not fit."""

from __future__ import annotations

import os
import pickle
import threading

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import gatedconv
from gatedconv.train.presets import PRESETS
from tests.oracle import random_masks, randomize_statistics
from tests.runtime.conftest import X, small_net

IMAGES = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def compact_resnet(gate="both", depth="resnet20"):
    torch.manual_seed(0)
    model = getattr(gatedconv.models, depth)(gate=gate, position="middle", input_size=(3, 16, 16)).eval()
    randomize_statistics(model, 0)
    masks = random_masks({name: g.num_gates for name, g in gatedconv.gates(model).items()}, "odd", 1)
    return gatedconv.compact(gatedconv.freeze(model, masks=masks), X)


def segmenter():
    """Its output is a map."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), nn.GELU(), nn.Upsample(scale_factor=2), nn.Conv2d(8, 4, 1), nn.Sigmoid()
    ).eval()


NETS = {
    "small": small_net,
    "compact": compact_resnet,
    "dense": lambda: compact_resnet("channel", "resnet32"),
    "map": segmenter,
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("isa", ["", "avx2", "portable"])
def test_outputs_are_the_engines_bit_for_bit(rt, export, name, isa, monkeypatch):
    monkeypatch.setenv("GATEDCONV_ISA", isa)
    try:
        rt.isa()
    except rt.PlanError as error:
        pytest.skip(str(error))
    model = NETS[name]()
    net, engine = rt.load(export(model)), gatedconv.Engine(model, X)
    for x in (X, X[:1], torch.randn(2, 3, 20, 24), torch.randn(0, 3, 16, 16)):
        expected = engine(x).numpy()
        for threads in (1, 2):
            y = net(x.numpy(), threads=threads)
            assert y.shape == expected.shape == net.output_size(tuple(x.shape)) and y.dtype == np.float32
            np.testing.assert_array_equal(y, expected)


def test_the_demos_network_has_the_engines_bits(rt, export):
    demo = PRESETS["demo"]
    torch.manual_seed(0)
    size = (1, 8, 8)  # of the digits
    make = getattr(gatedconv.models, demo["model"])
    gated = make(10, demo["gate"], position=demo["position"], input_size=size).eval()
    randomize_statistics(gated, 0)
    masks = {name: torch.tensor([i % 2 == 0]) for i, name in enumerate(gatedconv.gates(gated))}
    x = torch.rand(5, *size)
    for model in (make(10, input_size=size).eval(), gatedconv.compact(gatedconv.freeze(gated, masks=masks), x)):
        net, engine = rt.load(export(model, x)), gatedconv.Engine(model, x)
        for images in (x, x[:1]):
            np.testing.assert_array_equal(net(images.numpy(), threads=2), engine(images).numpy())


def test_inputs_of_any_strides_do(rt, plan_bytes):
    net, x = rt.load(plan_bytes), X.numpy()
    expected = net(x)
    unaligned = np.zeros(x.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(x.shape)
    unaligned[...] = x
    assert not unaligned.flags.aligned
    for other in (
        unaligned,
        np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
        np.ascontiguousarray(x[..., ::-1])[..., ::-1],
        np.repeat(x, 2, 3)[..., ::2],
        np.asfortranarray(x),
    ):
        np.testing.assert_array_equal(net(other), expected)
    np.testing.assert_array_equal(net(np.broadcast_to(x[:1], x.shape)), np.repeat(net(x[:1]), 3, 0))


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (X.double().numpy(), TypeError, "array of float64"),
        (X.numpy().astype(">f4"), TypeError, "array of >f4"),
        (X, TypeError, "Tensor"),
        ([1.0], TypeError, "list"),
        (X[0].numpy(), ValueError, r"shape \(N, C, H, W\), got \(3, 16, 16\)"),
        (X[:, :2].numpy(), ValueError, "must have 3 channels, got 3 x 2 x 16 x 16"),
        (X[:, :, :0].numpy(), ValueError, "empty or too large"),
        (np.zeros((1, 3, 1, 1), np.float32), ValueError, "smaller than the kernel"),
        (np.broadcast_to(np.float32(0), (1 << 40, 3, 16, 16)), ValueError, "a batch of .* images is too large"),
        (np.broadcast_to(np.float32(0), (1, 3, 1 << 20, 16)), ValueError, "too large"),
        (np.broadcast_to(np.float32(0), (1, 3, 1 << 18, 1 << 18)), ValueError, "too large"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(rt, plan_bytes, x, error, words):
    net = rt.load(plan_bytes)
    with pytest.raises(error, match=words):
        net(x)


def test_no_memory_for_the_output_is_an_error_of_the_plan(rt, plan_bytes, monkeypatch):
    net = rt.load(plan_bytes)

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(np, "empty", fail)
    with pytest.raises(rt.PlanError, match="^no memory$"):
        net(np.zeros(net.input_size, np.float32))


def test_a_plan_returns_the_metadata_of_its_file(rt, plan_bytes):
    net = rt.load(plan_bytes)
    assert net.input_size == (3, 3, 16, 16) and net.output_size((7, 3, 20, 20)) == (7, 5)
    assert net.classes == ("cat", "dog", "Füchsin", 'a "b"\\', "e")
    assert net.mean == (0.5, 0.25, 0.125) and net.std == (0.2, 0.3, 0.1)
    assert net.producer.startswith("gatedconv ")
    text = net.describe()
    assert "depthwise 3x3" in text and "conv 3x3 stride 2 + silu" in text and "M MACs" in text
    assert "Plan for inputs of 1 x 3 x 32 x 32" in net.describe((1, 3, 32, 32))
    assert net.workspace() > 0 and "input_size=(3, 3, 16, 16)" in repr(net)


def test_the_file_is_safetensors_and_the_same_at_every_export(export, plan_bytes):
    tensors = safetensors.torch.load(plan_bytes)
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "program": torch.int64,
        "weights": torch.float32,
    }
    plan = gatedconv.Engine(small_net(), X).plans[0]
    assert torch.equal(tensors["program"], plan.program)
    # The weights of the one layer that Winograd's algorithm computes are left out.
    (winograd,) = (step for step in plan.steps if step.op.startswith("winograd"))
    assert len(tensors["weights"]) == len(plan.weights) - winograd.weight_bytes // 4
    first = export(small_net()).read_bytes()
    assert export(small_net()).read_bytes() == first


def test_a_plan_has_no_pickle_and_no_other_arguments(rt, plan_bytes):
    net = rt.load(plan_bytes)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(net)
    for threads, error in ((-1, ValueError), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="threads must be"):
            rt.load(plan_bytes, threads=threads)
    with pytest.raises(TypeError, match="expected a path or bytes, got int"):
        rt.load(3)


def test_threads_share_a_plan_and_run_several(rt, export, plan_bytes):
    nets = [rt.load(plan_bytes), rt.load(export(compact_resnet()))]
    expected = [net(X.numpy()) for net in nets]
    wrong = []

    def work(which):
        for _ in range(20):
            if not np.array_equal(nets[which % 2](X.numpy(), threads=1 + which % 3), expected[which % 2]):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forked_process_keeps_using_a_plan(rt, plan_bytes):
    net = rt.load(plan_bytes, threads=2)
    expected = net(X.numpy())
    child = os.fork()
    if child == 0:  # no assertion here: it must not come back into pytest
        os._exit(0 if np.array_equal(net(X.numpy()), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
    np.testing.assert_array_equal(net(X.numpy()), expected)


def published(name):
    """A torchvision network with random weights, images of 64 pixels."""
    networks = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = getattr(networks, name)().eval()
    randomize_statistics(model, 0)
    return model


def compact_published(name):
    """The same with a random half of its channels removed."""
    gated = gatedconv.gate_model(published(name), "channel", position="middle", example_input=IMAGES)
    masks = random_masks({key: gate.num_gates for key, gate in gatedconv.gates(gated).items()}, "odd", 1)
    return gatedconv.compact(gatedconv.freeze(gated, masks=masks), IMAGES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_b0", "resnet50"])
@pytest.mark.parametrize("make", [published, compact_published])
def test_published_networks_are_one_plan_with_the_engines_bits(rt, export, name, make):
    model = make(name)
    net, engine = rt.load(export(model, IMAGES)), gatedconv.Engine(model, IMAGES)
    for x in (IMAGES, torch.randn(2, 3, 96, 64)):
        np.testing.assert_array_equal(net(x.numpy(), threads=2), engine(x).numpy())


@pytest.mark.slow
@pytest.mark.parametrize("depth", ["resnet20", "resnet32", "resnet44", "resnet56", "resnet110"])
def test_cifar_networks_are_one_plan_with_the_engines_bits(rt, export, depth):
    for model in (getattr(gatedconv.models, depth)().eval(), compact_resnet("both", depth)):
        x = torch.randn(2, 3, 32, 32)
        np.testing.assert_array_equal(rt.load(export(model, x))(x.numpy()), gatedconv.Engine(model, x)(x).numpy())
