"""count_macs: fvcore's rules, and executed channels only."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import gatedconv
from gatedconv import count_macs, models, ops
from gatedconv.measure.macs import conv_and_linear_macs, count_macs_by_operator
from gatedconv.ops._masked_conv2d_args import executed_macs
from tests.oracle import random_masks


def test_layers_by_hand():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, groups=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1, groups=4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )
    pixels = 6 * 7
    expected = pixels * (3 * 8 * 9 + 2 * 8 + 8 * 4 // 4 + 4) + 4 * 5
    assert gatedconv.count_macs(net, torch.zeros(1, 3, 6, 7)) == expected
    assert net.training  # left as it was


@pytest.mark.parametrize("position", ["before", "middle", "after"])
def test_a_frozen_net_executes_the_convolutions_of_its_compact_net(position):
    model = gatedconv.models.resnet20(gate="both", position=position, input_size=(3, 8, 8)).eval()
    masks = random_masks({n: g.num_gates for n, g in gatedconv.gates(model).items()}, "odd", 2)
    x = torch.zeros(1, 3, 8, 8)
    frozen = gatedconv.freeze(model, masks=masks)
    small = gatedconv.compact(frozen, x)

    def norms(net):  # a frozen norm runs at full width; the compact one does not
        return sum(2 * m.num_features * size for m, size in norm_sizes(net, x))

    assert gatedconv.count_macs(frozen, x) - norms(frozen) == gatedconv.count_macs(small, x) - norms(small)


def norm_sizes(net, x):
    sizes = []
    hooks = [
        m.register_forward_hook(lambda m, a, out: sizes.append((m, out.shape[2] * out.shape[3])))
        for m in net.modules()
        if isinstance(m, nn.BatchNorm2d)
    ]
    net(x)
    for hook in hooks:
        hook.remove()
    return sizes


def test_a_frozen_conv_counts_open_outputs_and_images():
    conv = gatedconv.Conv2d(6, 8, 3, padding=1, groups=2, gate="channel")
    net = gatedconv.freeze(nn.Sequential(conv), masks={"0.gate": torch.tensor([1, 1, 0, 0, 0, 0, 0, 1]).bool()})
    assert gatedconv.count_macs(net, torch.zeros(5, 6, 4, 4)) == 5 * 16 * 3 * (3 * 9)


@pytest.mark.parametrize("closed", ["", "group1", "group3"])
def test_large_layers_of_a_frozen_net_are_counted_once(closed):
    """Where everything is open and a layer is large, PyTorch's convolution runs in place of ours."""
    model, x = models.cifar_vgg(10, "channel").eval(), torch.zeros(1, 3, 32, 32)
    masks = {}
    for name, gate in gatedconv.gates(model).items():
        masks[name] = torch.arange(gate.num_gates) < gate.num_gates // (4 if closed and closed in name else 1)
    frozen = gatedconv.freeze(model, masks=masks).eval()
    small = gatedconv.compact(frozen, x)
    found, expected = count_macs_by_operator(frozen, x), count_macs_by_operator(small, x)
    assert conv_and_linear_macs(found) == conv_and_linear_macs(expected)


def test_pytorchs_counter_sees_what_a_frozen_convolution_executes():
    conv = gatedconv.Conv2d(6, 8, 3, padding=1, gate="channel", groups=2)
    net = gatedconv.freeze(nn.Sequential(conv), masks={"0.gate": torch.tensor([1, 1, 0, 0, 0, 0, 0, 1]).bool()})
    x = torch.zeros(5, 6, 4, 4)
    for inference in (True, False):
        with torch.inference_mode(inference), FlopCounterMode(display=False) as counter:
            net(x)
        assert counter.get_total_flops() == 2 * count_macs(net, x)


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="must be a torch.nn.Module"):
        gatedconv.count_macs("resnet", torch.zeros(1))
    with pytest.raises(TypeError, match="example_input must be a tensor"):
        gatedconv.count_macs(nn.Identity(), (1, 3, 8, 8))
    model = gatedconv.models.resnet20(input_size=(3, 8, 8)).eval()
    engine = gatedconv.Engine(model, torch.zeros(1, 3, 8, 8))
    with pytest.raises(TypeError, match="an Engine's plan hides its layers"):
        count_macs(engine, torch.zeros(1, 3, 8, 8))


def test_convolutions_and_linear_layers_are_counted_apart() -> None:
    counts = count_macs_by_operator(models.resnet20(), torch.zeros(1, 3, 32, 32))
    # Inputs, outputs and side of the output of every 3x3 convolution of ResNet-20.
    stages = [(3, 16, 32), *[(16, 16, 32)] * 6, (16, 32, 16), *[(32, 32, 16)] * 5, (32, 64, 8), *[(64, 64, 8)] * 5]
    three = [3 * 3 * inputs * outputs * side**2 for inputs, outputs, side in stages]
    projections = 16 * 32 * 16**2 + 32 * 64 * 8**2
    assert conv_and_linear_macs(counts) == sum(three) + projections + 64 * 10
    assert (
        conv_and_linear_macs(counts) < sum(counts.values()) == count_macs(models.resnet20(), torch.zeros(1, 3, 32, 32))
    )


@pytest.mark.parametrize("groups", [1, 2])
def test_masks_of_inputs_for_each_sample_are_counted(groups: int) -> None:
    """On CUDA the operator takes (N, C_in): each sample executes its open outputs from its own open inputs."""
    outputs = torch.tensor([[1, 1, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]]).bool()
    inputs = torch.tensor([[1, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]]).bool()

    def pairs(out_open: torch.Tensor, in_open: torch.Tensor) -> int:
        parts = zip(out_open.chunk(groups), in_open.chunk(groups), strict=True)
        return sum(int(outs.sum() * ins.sum()) for outs, ins in parts)

    def counted(out_open: torch.Tensor, in_open: torch.Tensor | None) -> int:
        return executed_macs(torch.zeros(8, 6 // groups, 3, 3), out_open, in_open, groups, (3, 8, 4, 4)) // (16 * 9)

    each = [pairs(outs, ins) for outs, ins in zip(outputs, inputs, strict=True)]
    assert counted(outputs, inputs) == sum(each)
    assert counted(outputs[0], inputs[0]) == 3 * each[0]
    assert counted(outputs[0], inputs) == sum(pairs(outputs[0], ins) for ins in inputs)
    assert counted(outputs, inputs[0]) == sum(pairs(outs, inputs[0]) for outs in outputs)
    assert counted(outputs, None) == sum(pairs(outs, torch.ones(6)) for outs in outputs)


def test_masks_of_inputs_for_each_sample_are_zeroed_on_the_cpu_and_all_inputs_executed() -> None:
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out_open, in_open = torch.tensor([True, False]), torch.tensor([[True, False, False], [False, False, True]])
            return ops.masked_conv2d(x, torch.ones(2, 3, 1, 1), None, out_open, in_open)

    assert count_macs(Masked(), torch.zeros(2, 3, 4, 4)) == 2 * 16 * 3


class Tokens(nn.Module):
    """A layer on the 16 patches of an image."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.patches, self.layer = nn.Conv2d(3, 16, 8, 8), layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        out = (
            self.layer(tokens, tokens, tokens) if isinstance(self.layer, nn.MultiheadAttention) else self.layer(tokens)
        )
        return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("layer", [nn.MultiheadAttention, partial(nn.TransformerEncoderLayer, dim_feedforward=32)])
def test_attention_counts_what_pytorch_counts(layer) -> None:
    model, x = Tokens(layer(16, 4, dropout=0.0, batch_first=True)), torch.randn(2, 3, 32, 32)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the one that it counts on every CPU
        model(x)
    counts = count_macs_by_operator(model, x)
    norms = counts.pop("layer_norm", 0)
    assert 2 * counts.total() == counter.get_total_flops()
    assert bool(norms) == isinstance(model.layer, nn.TransformerEncoderLayer)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers_multiply_by_their_weights_at_every_step(kind, gates) -> None:
    model = Tokens(kind(16, 8, 2, bidirectional=True, batch_first=True))
    layers = 2 * gates * 8 * (16 + 8) + 2 * gates * 8 * (2 * 8 + 8)
    assert count_macs(model, torch.randn(3, 3, 32, 32)) == 3 * 16 * (3 * 8 * 8 * 16 + layers)


def test_autocast_does_not_change_what_is_counted() -> None:
    model, x = models.resnet20(gate="channel"), torch.randn(1, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        within = count_macs_by_operator(model, x)
    assert within == count_macs_by_operator(model, x)
