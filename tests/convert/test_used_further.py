"""What users do to a gated, frozen or compact network afterwards, and what they had done to it before."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import gatedconv
from tests.convert.unusual import block, images
from tests.tolerances import assert_close


class ConvNorm(nn.Module):
    """A convolution and its norm, under the names by which detectors fuse them."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)

    def forward(self, x):
        return torch.nn.functional.silu(self.bn(self.conv(x)))


class Detector(nn.Module):
    """A residual block of them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.out = ConvNorm(3, 16), ConvNorm(16, 16), ConvNorm(16, 16), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = self.a(x)
        return self.out(x + self.c(self.b(x)))


def lively(model):
    """The model in eval mode with norms as after training."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.eval()


def frozen_by(model, x, kind="odd", gate="channel"):
    gated = gatedconv.gate_model(model, gate, example_input=x)
    masks = {}
    for name, found in gatedconv.gates(gated).items():
        index = torch.arange(found.num_gates)
        masks[name] = index % 2 == 0 if kind == "odd" else index == 3
    return gatedconv.freeze(gated, masks=masks).eval()


def own_fuse(conv, norm):
    """As YOLOv5, YOLOX and others do: into a new convolution, of the attributes of the two."""
    fused = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    fused.weight.data = (conv.weight * scale[:, None, None, None]).detach()
    fused.bias.data = (norm.bias - norm.running_mean * scale).detach()
    return fused


@pytest.mark.parametrize("fuse", [fuse_conv_bn_eval, own_fuse])
@pytest.mark.parametrize("kind", ["odd", "one"])
def test_norms_of_a_frozen_network_can_be_fused_and_those_in_frames_say_no(fuse, kind):
    x = images(2, 3, 16, 16)
    frozen = frozen_by(lively(Detector()), x, kind)
    small = gatedconv.compact(frozen, x).eval()
    fused = copy.deepcopy(frozen)
    for module in (fused.a, fused.b, fused.c):
        module.conv, module.bn = fuse(module.conv, module.bn), nn.Identity()
    with torch.no_grad():
        assert_close(fused(x), frozen(x))
    with pytest.raises(AttributeError, match="is that of a BatchNorm2d with modules around it, which fusing it"):
        for module in (small.a, small.b, small.c):
            fuse(module.conv, module.bn)


def test_shared_norms_keep_their_weights():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = ConvNorm(3, 8), ConvNorm(8, 8), nn.Conv2d(8, 4, 1)
            self.b.bn.weight, self.b.bn.bias = self.a.bn.weight, self.a.bn.bias

        def forward(self, x):
            return self.out(self.b(self.a(x)))

    x = images(2, 3, 16, 16)
    model = lively(Shared())
    frozen = frozen_by(model, x)
    assert torch.equal(frozen.a.bn.weight, model.a.bn.weight)
    with torch.no_grad():
        assert_close(gatedconv.compact(frozen, x)(x), frozen(x))


class Rows(nn.Module):
    """Layers that carry where they read from, as networks from configuration files do."""

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)]
        self.model = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(16, 4, 1))
        for number, layer in enumerate(self.model):
            layer.i, layer.f = number, -1

    def forward(self, x):
        for number, layer in enumerate(self.model):
            assert layer.i == number and layer.f == -1
            x = layer(x)
        return x


@pytest.mark.parametrize("closed", [False, True])
def test_attributes_of_layers_stay(closed, tmp_path):
    x = images(2, 3, 16, 16)
    gated = gatedconv.gate_model(Rows().eval(), "channel", example_input=x)
    masks = {n: torch.arange(g.num_gates) % 2 == 2 * closed for n, g in gatedconv.gates(gated).items()}
    frozen = gatedconv.freeze(gated, masks=masks).eval()
    small = gatedconv.compact(frozen, x).eval()
    gatedconv.save(small, tmp_path / "m")
    back = gatedconv.load(tmp_path / "m", into=Rows())
    with torch.no_grad():
        for result in (small, back, copy.deepcopy(small)):
            assert_close(result(x), frozen(x))


def test_hooks_of_all_kinds_stay():
    x, seen = images(2, 3, 16, 16), []
    model = nn.Sequential(block(3, 8), block(8, 8), nn.Conv2d(8, 4, 1)).eval()
    gated = gatedconv.gate_model(model, "channel", example_input=x)
    convs = [module for module in gated.modules() if isinstance(module, nn.Conv2d)]
    for conv in convs:
        conv.register_full_backward_hook(lambda *_: seen.append("backward"))
        conv.register_forward_hook(lambda module, args, kwargs, output: seen.append("after"), with_kwargs=True)
        conv.register_forward_pre_hook(lambda module, args, kwargs: seen.append("before"), with_kwargs=True)
    masks = {name: torch.arange(gate.num_gates) % 2 == 0 for name, gate in gatedconv.gates(gated).items()}
    frozen = gatedconv.freeze(gated, masks=masks)
    for network in (frozen, gatedconv.compact(frozen, x)):
        seen.clear()
        network(x).sum().backward()
        assert sorted(seen) == 3 * ["after"] + 3 * ["backward"] + 3 * ["before"]


class Flattened(nn.Module):
    """A dense layer on all positions, flattened behind the channels' dimension."""

    def __init__(self):
        super().__init__()
        self.features, self.fc = block(3, 8), nn.Linear(8 * 16 * 16, 5)

    def forward(self, x):
        return self.fc(self.features(x).permute(0, 2, 3, 1).flatten(1))


def test_an_image_of_another_size_is_refused_where_the_network_refuses_it():
    x = images(2, 3, 16, 16)
    frozen = frozen_by(Flattened().eval(), x)
    small = gatedconv.compact(frozen, x)
    engine = gatedconv.Engine(small, x)
    for other in (images(2, 3, 32, 16), images(2, 3, 16, 8)):
        for network in (frozen, small, engine):
            with pytest.raises((RuntimeError, ValueError)):
                network(other)


def test_a_compact_network_is_traced_by_fx():
    x = images(2, 3, 16, 16)
    small = gatedconv.compact(frozen_by(lively(Detector()), x), x).eval()
    assert any(type(module).__name__ == "ScatterChannels" for module in small.modules())
    with torch.no_grad():
        assert_close(torch.fx.symbolic_trace(small)(x), small(x))


class Inner(nn.Module):
    """Ends in a function: its output has no module of its own."""

    def __init__(self):
        super().__init__()
        self.c1, self.n, self.c2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        return torch.sigmoid(self.c2(torch.relu(self.n(self.c1(x))))) * 2


def test_a_frame_inside_of_a_frame_is_where_its_layer_is(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.att, self.out = block(3, 16), Inner(), nn.Conv2d(16, 4, 1)

        def forward(self, x):
            x = self.a(x)
            return self.out(torch.relu(x + self.att(x)))

    x = images(2, 3, 16, 16)
    gated = gatedconv.gate_model(Net().eval(), "both", example_input=x)
    masks = {name: torch.arange(gate.num_gates) % 2 == 1 for name, gate in gatedconv.gates(gated).items()}
    assert "att.c1.layer_gate" in masks  # closed: it has one gate
    small = gatedconv.compact(gatedconv.freeze(gated, masks=masks).eval(), x).eval()
    assert "n" not in dict(small.att.named_children())
    gatedconv.save(small, tmp_path / "m")
    with torch.no_grad():
        assert_close(gatedconv.load(tmp_path / "m")(x), small(x))


def test_macs_of_an_unused_convolution():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = block(3, 8), block(8, 8), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            x = self.a(x)
            self.b(x)
            return self.c(x)

    x = images(1, 3, 16, 16)
    frozen = frozen_by(Unused().eval(), x)
    assert gatedconv.count_macs(frozen, x) > gatedconv.count_macs(gatedconv.compact(frozen, x), x)


def test_a_loader_of_several_inputs_is_explained():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = block(3, 8), block(3, 8), nn.Conv2d(8, 4, 1)

        def forward(self, x, y):
            return self.out(self.a(x) + self.b(y))

    x = images(2, 3, 16, 16)
    gated = gatedconv.gate_model(Pair(), "channel", example_input=(x, x))
    with pytest.raises(
        TypeError, match=r"freeze: Pair does not take what the loader yields: .*'y'; .*\(\(a, b\), labels"
    ):
        gatedconv.freeze(gated, [(x, x, torch.zeros(2))])
    assert gatedconv.freeze(gated, [((x, x), torch.zeros(2))]).consensus.agreement is not None


@pytest.mark.parametrize("position", ["after", "middle"])
@pytest.mark.parametrize(
    "between", [(nn.ReLU(),), (nn.MaxPool2d(2),), (nn.Dropout2d(0.1),), (nn.LeakyReLU(0.1), nn.AvgPool2d(2))]
)
def test_a_norm_behind_an_activation_or_pool_is_the_layers_own(position, between):
    def part(inputs, outputs):
        conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return nn.Sequential(conv, *copy.deepcopy(between), nn.BatchNorm2d(outputs), nn.GELU())

    x = images(2, 3, 32, 32)
    model = lively(nn.Sequential(part(3, 16), part(16, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)))
    gated = gatedconv.gate_model(model, "channel", position=position, example_input=x)
    masks = {name: torch.arange(gate.num_gates) % 2 == 0 for name, gate in gatedconv.gates(gated).items()}
    assert len(masks) == 2
    frozen = gatedconv.freeze(gated, masks=masks).eval()
    small = gatedconv.compact(frozen, x).eval()
    assert [conv.out_channels for conv in small.modules() if isinstance(conv, nn.Conv2d)] == [8, 16]
    with torch.no_grad():
        assert_close(small(x), frozen(x))


def test_the_projection_of_a_block_with_an_embedding_is_its_shortcut():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.c1, self.time = block(3, 16), nn.Conv2d(16, 24, 3, padding=1), nn.Linear(6, 24)
            self.c2, self.skip, self.out = nn.Conv2d(24, 24, 3, padding=1), nn.Conv2d(16, 24, 1), nn.Conv2d(24, 4, 1)

        def forward(self, x, t):
            x = self.stem(x)
            h = torch.relu(self.c1(x) + self.time(t)[:, :, None, None])
            return self.out(torch.relu(self.skip(x) + self.c2(h)))

    gated = gatedconv.gate_model(Embedded(), "both", example_input=(images(2, 3, 16, 16), images(2, 6)))
    assert {"c1.channel_gate", "c2.channel_gate"} <= set(gatedconv.gates(gated))
    assert not any("layer_gate" in name for name in gatedconv.gates(gated))
    assert gated.conversion.reachable_macs > 0.9


class Masked(nn.Conv2d):
    """A convolution that sees the pixels above and to the left, as PixelCNN's."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, 3, padding=1)
        self.register_buffer("mask", torch.ones_like(self.weight))
        self.mask[:, :, 1, 2:], self.mask[:, :, 2] = 0, 0

    def forward(self, x):
        return self._conv_forward(x, self.weight * self.mask, self.bias)


def test_masks_of_weights_lose_the_same_channels():
    x = images(2, 3, 16, 16)
    frozen = frozen_by(nn.Sequential(Masked(3, 8), nn.ReLU(), Masked(8, 8), nn.ReLU(), Masked(8, 4)).eval(), x)
    small = gatedconv.compact(frozen, x).eval()
    assert [tuple(part.mask.shape[:2]) for part in small.modules() if isinstance(part, Masked)] == [
        (4, 3),
        (4, 4),
        (4, 4),
    ]
    with torch.no_grad():
        assert_close(small(x), frozen(x))


def test_a_forward_that_was_put_on_a_layer_stays():
    x = images(2, 3, 16, 16)
    model = lively(nn.Sequential(block(3, 8), block(8, 8), nn.Conv2d(8, 4, 1)))
    conv = model[1][0]
    conv.forward = types.MethodType(lambda self, input: 2 * nn.Conv2d.forward(self, input), conv)
    frozen = frozen_by(model, x)
    expected = copy.deepcopy(model)
    for name, gate in gatedconv.gates(frozen).items():
        module, mask = expected.get_submodule(name.rpartition(".")[0]), gate.mask.float()[:, None, None]
        module.register_forward_hook(lambda module, args, output, mask=mask: output * mask)
    with torch.no_grad():
        assert_close(frozen(x), expected(x))
        assert_close(gatedconv.compact(frozen, x)(x), expected(x))


class ReadsItsNorm(nn.Module):
    """Code that reads a norm's parameters beside the norm: attention by its weights, or another call."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.c, self.bn = kind, nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.d, self.out = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        h = self.bn(self.c(x))
        if self.kind == "attention":
            share = self.bn.weight.abs() / self.bn.weight.abs().sum()
            return self.out(torch.relu(self.d(torch.sigmoid(h * share[:, None, None]))))
        bn = self.bn
        again = torch.nn.functional.batch_norm(self.d(h), bn.running_mean, bn.running_var, bn.weight, bn.bias, False)
        return self.out(torch.relu(again))


@pytest.mark.parametrize("kind", ["attention", "again"])
@pytest.mark.parametrize("saved", [False, True])
def test_a_norm_whose_parameters_code_reads_keeps_them(kind, saved, tmp_path):
    x = images(2, 3, 16, 16)
    model = lively(ReadsItsNorm(kind))
    gated = gatedconv.gate_model(model, "channel", example_input=x)
    if saved:
        gatedconv.save(gated, tmp_path / "m")
        gated = gatedconv.load(tmp_path / "m", into=model)
    masks = {name: torch.arange(gate.num_gates) % 2 == 0 for name, gate in gatedconv.gates(gated).items()}
    frozen = gatedconv.freeze(gated, masks=masks).eval()
    expected = copy.deepcopy(model)
    for name, mask in masks.items():
        module = expected.get_submodule(name.rpartition(".")[0])
        module.register_forward_hook(lambda module, args, output, mask=mask: output * mask.float()[:, None, None])
    with torch.no_grad():
        assert_close(frozen(x), expected(x))


def test_gradients_by_torch_func():
    x = images(2, 3, 16, 16)
    gated = gatedconv.gate_model(lively(Detector()), "both", position="middle", example_input=x).eval()
    parameters = dict(gated.named_parameters())
    gated(x).square().sum().backward()

    def loss(weights):
        return torch.func.functional_call(gated, weights, (x,)).square().sum()

    for name, found in torch.func.grad(loss)(parameters).items():
        assert_close(found, parameters[name].grad if parameters[name].grad is not None else torch.zeros_like(found))


def test_errors_of_the_models_own_code_and_loaders_of_any_kind():
    class Batches:
        def __len__(self):
            return 2

        def __getitem__(self, index):
            if index >= 2:
                raise IndexError(index)
            return images(2, 3, 32, 32)

    def fails(module, args):
        raise TypeError("of a hook")

    model = gatedconv.models.resnet20(gate="channel")
    assert gatedconv.freeze(model, Batches()).consensus.agreement is not None
    model.register_forward_pre_hook(fails)
    with pytest.raises(TypeError, match="^of a hook$"):
        gatedconv.freeze(model, Batches())


def test_private_attributes_of_layers_stay():
    x = images(2, 3, 16, 16)
    model = nn.Sequential(block(3, 8), block(8, 8), nn.Conv2d(8, 4, 1)).eval()
    model[1][0]._mine = 3
    frozen = frozen_by(model, x)
    assert frozen[1][0]._mine == gatedconv.compact(frozen, x)[1][0]._mine == 3


def test_middle_leaves_the_end_of_a_branch_alone():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.c1, self.b1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.c2, self.b2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x):
            return x + self.b2(torch.relu(self.c2(self.b1(torch.relu(self.c1(x))))))

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Block(), nn.Conv2d(8, 4, 1)).eval()
    gated = gatedconv.gate_model(model, "channel", position="middle", example_input=images(2, 3, 16, 16))
    assert list(gatedconv.gates(gated)) == ["1.b1.channel_gate"]
