"""compact on any graph: equal to the dense model with its outputs masked, and smaller."""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle

import pytest
import torch
from torch import nn

import gatedconv
from gatedconv.convert import ConversionError, require_same
from gatedconv.nn import ScatterChannels
from tests.convert.networks import IMAGES, NETWORKS, masked_forward, network
from tests.oracle import random_masks
from tests.tolerances import WHOLE, assert_close, relative_error, tolerance

FOLLOW = {"group_norms": {"norm2": "norm1.channel_gate", "norm2b": "norm1.channel_gate"}}  # behind depthwise layers


@functools.cache
def gated(name, gate="channel", **options):
    model = network(name)
    return model, gatedconv.gate_model(model, gate, example_input=IMAGES, **options)


def masks_of(model, kind, seed=2):
    return random_masks({n: g.num_gates for n, g in gatedconv.gates(model).items()}, kind, seed)


@functools.cache
def compacted(name, gate, kind):
    """The dense model, the gated one, masks of this kind, and the frozen and the compact network."""
    model, result = gated(name, gate)
    masks = masks_of(result, kind)
    frozen = gatedconv.freeze(result, masks=masks)
    return model, result, masks, frozen, gatedconv.compact(frozen, IMAGES)


def error(found, expected, model):
    """Relative to the difference between two images' outputs, as in the contract."""
    dense = model(IMAGES)
    return float((found - expected).abs().max() / (dense[0] - dense[1]).abs().max())


@pytest.mark.parametrize("kind", ["open", "closed", "one", "odd"])
@pytest.mark.parametrize("name", NETWORKS)
def test_frozen_and_compact_equal_the_masked_dense_model(name, kind):
    gate = "both" if "fc.weight" in NETWORKS[name]().state_dict() and hasattr(NETWORKS[name](), "blocks") else "channel"
    model, _, masks, frozen, small = compacted(name, gate, kind)
    with torch.no_grad():
        follow = FOLLOW.get(name, {})
        expected = masked_forward(model, IMAGES, masks, follow)
        assert error(frozen(IMAGES), expected, model) <= tolerance()
        assert error(small(IMAGES), expected, model) <= tolerance()
        more = torch.randn(5, 3, 12, 12, generator=torch.Generator().manual_seed(9))
        assert error(small(more), masked_forward(model, more, masks, follow), model) <= tolerance()
        if kind == "odd":
            assert error(expected, model(IMAGES), model) > 1e-2
    assert not gatedconv.gates(small)


@pytest.mark.parametrize("position", ["middle", "before"])
@pytest.mark.parametrize("name", ["residual", "depthwise_dilated", "shuffled", "channels_last"])
def test_the_other_positions(name, position):
    model, result = gated(name, position=position)
    for kind in ("closed", "odd"):
        masks = masks_of(result, kind)
        frozen = gatedconv.freeze(result, masks=masks)
        with torch.no_grad():
            assert error(gatedconv.compact(frozen, IMAGES)(IMAGES), frozen(IMAGES), model) <= tolerance()


EXACT_MACS = ("relu", "sigmoid", "channels_last", "attention", "computed", "unet", "decoder")  # gated by channels
ESTIMATED_MACS = {"residual": "blocks.2", "grouped": "blocks.0.conv2", "shuffled": "head"}


@pytest.mark.parametrize("kind", ["odd", "one"])
@pytest.mark.parametrize("gate", ["channel", "both"])
@pytest.mark.parametrize("name", NETWORKS)
def test_expected_macs_are_those_of_the_compact_network_or_the_conversion_names_where_they_are_not(name, gate, kind):
    _, result, masks, _, small = compacted(name, gate, kind)
    expected = float(gatedconv.expected_macs(result, {n: m.double() for n, m in masks.items()}))
    exact = gatedconv.count_macs(small, IMAGES[:1]) == pytest.approx(expected, **WHOLE)
    assert exact or result.conversion.estimated
    assert name not in EXACT_MACS or gate == "both" or (exact and not result.conversion.estimated)
    if name in ESTIMATED_MACS and (gate == "both") == (name == "residual"):
        assert ESTIMATED_MACS[name] in result.conversion.estimated
        assert f"MACs estimated, {ESTIMATED_MACS[name]}: " in str(result.conversion)


@pytest.mark.parametrize("gate", ["channel", "both"])
def test_code_that_pools_a_closed_branch_is_the_only_work_left_in_it(gate):
    _, result = gated("residual", gate)
    masks = {n: torch.ones(g.num_gates, dtype=torch.bool) for n, g in gatedconv.gates(result).items()}
    masks["blocks.1.layer_gate" if gate == "both" else "blocks.1.bn3.channel_gate"][:] = False
    small = gatedconv.compact(gatedconv.freeze(result, masks=masks), IMAGES)
    block = small.get_submodule("blocks.1")
    assert not any(type(m) in (nn.Conv2d, nn.BatchNorm2d) for n, m in block.named_modules() if "project" not in n)
    project = gatedconv.count_macs(block.get_submodule("project"), torch.zeros(1, 8, 12, 12))
    assert gatedconv.count_macs(block, torch.zeros(1, 8, 12, 12)) == project + 36  # one channel of 6 x 6 pixels


def test_of_a_closed_branch_a_transposed_convolution_reads_one_channel():
    class Up(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 1)
            self.branch = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(12, 8, 4, 2, 1))
            self.head = nn.Conv2d(8, 5, 1)

        def forward(self, x):
            x = self.stem(x)
            return self.head(x + self.branch(x)).mean((2, 3))

    result = gatedconv.gate_model(Up().eval(), "layer", example_input=IMAGES)
    frozen = gatedconv.freeze(result, masks={"branch.0.layer_gate": torch.tensor([False])})
    small = gatedconv.compact(frozen, IMAGES)
    with torch.no_grad():
        assert_close(small(IMAGES), frozen(IMAGES))
    (up,) = (m for m in small.modules() if isinstance(m, nn.ConvTranspose2d))
    assert (up.in_channels, up.out_channels) == (1, 1) and "branch.2" in result.conversion.estimated


def test_a_frozen_network_runs_nothing_that_is_closed():
    _, result = gated("residual", "both")
    masks = masks_of(result, "open")
    masks["blocks.0.layer_gate"][:] = False
    masks["blocks.2.bn1.channel_gate"][1:] = False
    frozen = gatedconv.freeze(result, masks=masks)
    assert list(gatedconv.gates(frozen)) and set(gatedconv.gates(frozen)) == set(masks)
    conv = frozen.get_submodule("blocks.2.conv1")
    outputs = []
    conv.register_forward_hook(lambda m, a, o: outputs.append(o))
    frozen(IMAGES)
    assert outputs[0][:, 1:].abs().max() == 0 and outputs[0][:, 0].abs().max() > 0


def test_branches_vanish_and_names_stay():
    _, result = gated("residual", "both")
    masks = masks_of(result, "odd", seed=4)
    masks["blocks.1.layer_gate"][:] = False
    for i in (0, 2):
        masks[f"blocks.{i}.layer_gate"][:] = True
    small = gatedconv.compact(gatedconv.freeze(result, masks=masks), IMAGES)
    kinds = {type(m).__module__.split(".")[0] for m in small.modules() if type(m) is not nn.Module}
    assert kinds <= {"torch", "gatedconv", "abc"} | {type(small).__module__.split(".")[0]}
    assert type(small.get_submodule("blocks.0.conv1")) is nn.Conv2d
    assert type(small) is type(result) and isinstance(small.get_submodule("blocks.0.bn3.scatter"), ScatterChannels)
    assert not any(name.startswith("blocks.1.conv") for name in small.state_dict())
    assert small.get_submodule("blocks.0.conv1").out_channels == int(masks["blocks.0.bn1.channel_gate"].sum())


@pytest.mark.parametrize("multiple", [4, 8])
def test_widths_are_rounded_up_on_request(multiple):
    model, result = gated("residual")
    masks = masks_of(result, "odd", seed=5)
    frozen = gatedconv.freeze(result, masks=masks)
    small = gatedconv.compact(frozen, IMAGES, channel_multiple=multiple)
    with torch.no_grad():
        assert error(small(IMAGES), frozen(IMAGES), model) <= tolerance()
    widths = [m.out_channels for n, m in small.named_modules() if n.endswith(("conv1", "conv2"))]
    assert widths and all(w % multiple == 0 for w in widths)
    with pytest.raises(ValueError, match="channel_multiple"):
        gatedconv.compact(frozen, IMAGES, channel_multiple=0)


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.Sigmoid])
def test_a_dropped_in_conv_in_front_of_a_norm_leaves_the_norms_constant(act):
    torch.manual_seed(0)
    model = nn.Sequential(
        gatedconv.Conv2d(3, 8, 3, padding=1, gate="channel"),
        nn.BatchNorm2d(8),
        act(),
        nn.Conv2d(8, 6, 3, padding=1),
        act(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )
    model(torch.randn(16, 3, 12, 12))
    nn.init.uniform_(model[1].bias, 0.2, 0.8)
    model.eval()
    mask = torch.tensor([True, False, True, False, False, True, False, False])
    frozen = gatedconv.freeze(model, masks={"0.gate": mask})
    small = gatedconv.compact(frozen, IMAGES)
    with torch.no_grad():
        assert_close(small(IMAGES), frozen(IMAGES))
    assert small.get_submodule("0").out_channels == 3
    for kind in ("none", "all"):
        frozen = gatedconv.freeze(model, masks={"0.gate": torch.full((8,), kind == "all")})
        with torch.no_grad():
            small = gatedconv.compact(frozen, IMAGES)
            assert_close(small(IMAGES), frozen(IMAGES))


def test_a_compact_network_can_be_trained_further():
    _, result = gated("residual", "both")
    small = gatedconv.compact(gatedconv.freeze(copy.deepcopy(result).train(), masks=masks_of(result, "odd")), IMAGES)
    assert small.training
    small(IMAGES).square().mean().backward()
    assert all(p.grad is not None for p in small.parameters())


class Grouped(nn.Module):
    """Channels closed in front of padded grouped convolutions: constants that fade at the border."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 24, 3, padding=1, groups=4),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Conv2d(24, 24, 5, padding=2, groups=24),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Conv2d(24, 48, 3, padding=1, groups=24),
            nn.BatchNorm2d(48),
            nn.Sigmoid(),
            nn.Conv2d(48, 8, 3, padding=1, groups=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
        )
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))


def test_constants_hold_at_every_size(tmp_path):
    torch.manual_seed(0)
    model = Grouped()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.bias, -0.5, 0.5)
        norm.running_mean.uniform_(-0.5, 0.5)
    gates = gatedconv.gate_model(model.eval(), "channel", example_input=IMAGES)
    masks = {name: torch.arange(gate.num_gates) == 1 for name, gate in gatedconv.gates(gates).items()}
    frozen = gatedconv.freeze(gates, masks=masks)
    small = gatedconv.compact(frozen, IMAGES)
    gatedconv.save(small, tmp_path / "small")
    other = torch.randn(2, 3, 20, 16)
    loaded = gatedconv.load(tmp_path / "small")
    models = small, loaded, copy.deepcopy(small), pickle.loads(pickle.dumps(small)), gatedconv.Engine(small, IMAGES)
    with torch.no_grad():
        for compact in models:
            assert_close(compact(IMAGES), frozen(IMAGES))
            assert_close(compact(other), frozen(other))
        again = gatedconv.compact(frozen, other)
        assert_close(again(other), frozen(other))
    program = torch.export.export(small, (IMAGES,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert_close(program.module()(IMAGES[:1]), frozen(IMAGES[:1]))


def test_constants_of_every_size_leave_the_size_free():
    model, result = gated("residual")
    frozen = gatedconv.freeze(result, masks=masks_of(result, "odd"))
    small = gatedconv.compact(frozen, IMAGES)
    other = torch.randn(2, 3, 20, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert error(small(other), frozen(other), model) <= tolerance()


class ChannelsLastTail(nn.Module):
    """A branch that ends in code behind which the channels' dimension is unknown."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.drop = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Dropout(0.1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        h = self.conv(x).permute(0, 2, 3, 1)
        norm = h.norm(dim=(1, 2), keepdim=True)
        x = x + self.drop((h * (norm / norm.mean(dim=-1, keepdim=True))).cumsum(-1).permute(0, 3, 1, 2))
        return self.fc(x.mean((2, 3)))


@torch.no_grad()
@pytest.mark.parametrize("is_open", [True, False])
def test_a_branch_of_unknown_channels_closes_at_every_size(is_open, tmp_path):
    dense = ChannelsLastTail().eval()
    gates = gatedconv.gate_model(dense, "layer", example_input=IMAGES)
    (name,) = gatedconv.gates(gates)
    frozen = gatedconv.freeze(gates, masks={name: torch.tensor([is_open])})
    small = gatedconv.compact(frozen, IMAGES)
    gatedconv.save(small, tmp_path / "small")
    for other in (IMAGES, torch.randn(3, 3, 20, 16)):
        expected = dense(other) if is_open else dense.fc(dense.stem(other).mean((2, 3)))
        for found in (frozen, small, gatedconv.load(tmp_path / "small", into=ChannelsLastTail())):
            assert_close(found(other), expected)


GAIN = 1e4


class Amplified(nn.Module):
    """A response norm that divides by next to nothing."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1), nn.Linear(64, 3)
        self.norm = nn.BatchNorm2d(64)

    def forward(self, x):
        x = self.norm(self.b(self.a(x))).mean((2, 3))
        return self.fc((x - x.round(decimals=3)) * GAIN)


@torch.no_grad()
def test_rounding_that_a_network_amplifies_is_no_difference():
    torch.manual_seed(0)
    gates = gatedconv.gate_model(Amplified().eval(), "channel", example_input=IMAGES)
    masks = masks_of(gates, "odd")
    frozen = gatedconv.freeze(gates, masks=masks)
    small = gatedconv.compact(frozen, IMAGES)
    found, expected = small.double()(IMAGES.double()), frozen.double()(IMAGES.double())
    assert relative_error(found, expected) <= GAIN * tolerance(torch.float64)


class Scaled(nn.Module):
    """A network that is off by one factor in single precision and by another in double precision."""

    def __init__(self, single, double):
        super().__init__()
        self.single, self.double_ = single, double

    def forward(self, x):
        return x * (1 + (self.double_ if x.dtype == torch.float64 else self.single))


@pytest.mark.parametrize(
    ("own", "constant", "rounding"),
    [(1.5e-4, 2.9e-4, True), (1.5e-4, -1.4e-4, True), (1.5e-4, 3.2e-4, False), (6e-3, 1.2e-3, False)],
)
def test_a_constant_may_be_off_by_twice_what_rounding_costs_its_source(own, constant, rounding):
    source, result = Scaled(own, 0.0), Scaled(constant, constant)  # a constant stays rounded in double precision
    with contextlib.nullcontext() if rounding else pytest.raises(ConversionError, match="differs"):
        require_same(source, result, IMAGES, "compact")


class Stacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(2, 3)

    def forward(self, x):
        return self.fc(torch.stack([self.a(x), self.b(x)], 1).mean((2, 3, 4)))


@torch.no_grad()
def test_a_closed_map_holds_at_every_size():
    gates = gatedconv.gate_model(Stacked().eval(), "channel", example_input=IMAGES)
    masks = {n: torch.full((g.num_gates,), n.startswith("b")) for n, g in gatedconv.gates(gates).items()}
    frozen = gatedconv.freeze(gates, masks=masks)
    small = gatedconv.compact(frozen, IMAGES)
    engine = gatedconv.Engine(small, IMAGES)
    other = torch.randn(2, 3, 16, 16)
    for compact in (small, engine):
        assert_close(compact(IMAGES), frozen(IMAGES))
        assert_close(compact(other), frozen(other))


class OwnLinear(nn.Linear):
    """A linear layer with code of its own, as timm's."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


class OwnHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.b, self.act, self.fc = nn.Conv2d(8, 6, 1), nn.ReLU(), OwnLinear(6, 4)

    def forward(self, x):
        return self.fc(self.act(self.b(self.norm(self.a(x)))).mean((2, 3)))


@torch.no_grad()
def test_what_a_layer_reads_that_cannot_shrink_is_computed_even_where_all_of_it_is_constant():
    gates = gatedconv.gate_model(OwnHead().eval(), "channel", example_input=IMAGES, include=["a"])
    frozen = gatedconv.freeze(gates, masks={n: torch.zeros(g.num_gates) > 0 for n, g in gatedconv.gates(gates).items()})
    assert bool((gates.b.bias < 0).any())  # which the activation changes
    assert_close(gatedconv.compact(frozen, IMAGES)(IMAGES), frozen(IMAGES))


class ResponseNorm(nn.Module):
    """The response norm of ConvNeXt V2, over channels in dimension ``axis``."""

    def __init__(self, channels, axis):
        super().__init__()
        self.axis = axis
        self.weight, self.bias = nn.Parameter(torch.rand(channels)), nn.Parameter(torch.rand(channels))

    def forward(self, x):
        shape = [-1 if d == self.axis % 4 else 1 for d in range(4)]
        size = x.norm(dim=(2, 3) if self.axis == 1 else (1, 2), keepdim=True)
        size = size / (size.mean(dim=self.axis, keepdim=True) + 1e-6)
        return x + torch.addcmul(self.bias.view(shape), self.weight.view(shape), x * size)


class ResponseNet(nn.Module):
    def __init__(self, last):
        super().__init__()
        self.last = last
        self.stem, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.fc1, self.fc2 = (
            (nn.Linear(6, 24), nn.Linear(24, 6)) if last else (nn.Conv2d(6, 24, 1), nn.Conv2d(24, 6, 1))
        )
        self.grn, self.head = ResponseNorm(24, -1 if last else 1), nn.Conv2d(6, 5, 1)

    def forward(self, x):
        x = self.norm(self.stem(x))
        y = x.permute(0, 2, 3, 1) if self.last else x
        y = self.fc2(self.grn(torch.nn.functional.gelu(self.fc1(y))))
        return self.head(x + (y.permute(0, 3, 1, 2) if self.last else y)).mean((2, 3))


@torch.no_grad()
@pytest.mark.parametrize("last", [True, False])
def test_what_is_behind_a_mean_over_channels_shrinks_wherever_the_channels_are(last):
    model = gatedconv.gate_model(ResponseNet(last).eval(), "channel", example_input=IMAGES)
    masks = masks_of(model, "odd")
    gate = next(name for name in masks if name.startswith("fc1"))
    frozen = gatedconv.freeze(model, masks=masks)
    small = gatedconv.compact(frozen, IMAGES)
    assert_close(small(IMAGES), frozen(IMAGES))
    assert small.fc2.layer.weight.shape[1] == int(masks[gate].sum()) < 24


class Product(nn.Module):
    """Two maps, each with a gate, multiplied."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = (
            nn.Conv2d(3, 16, 3, bias=False),
            nn.Conv2d(3, 16, 3, bias=False),
            nn.Conv2d(16, 4, 3),
        )

    def forward(self, x):
        return self.head(self.a(x) * self.b(x)).mean((2, 3))


def test_the_macs_of_a_product_are_those_of_channels_that_are_open_on_both_sides():
    model = gatedconv.gate_model(Product().eval(), "channel", example_input=IMAGES)
    halves = torch.arange(16) < 8, torch.arange(16) % 2 == 0
    masks = dict(zip(gatedconv.gates(model), halves, strict=True))
    small = gatedconv.compact(gatedconv.freeze(model, masks=masks), IMAGES)
    assert small.head.weight.shape[1] == 4
    expected = float(gatedconv.expected_macs(model, {n: m.double() for n, m in masks.items()}))
    assert expected == pytest.approx(gatedconv.count_macs(small, IMAGES[:1]), **WHOLE)


class NormAct(nn.BatchNorm2d):
    """A norm with its activation, as timm's: code of its own, and numbers for each channel."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x):
        x = nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return self.act(self.drop(x))


class NormActBlock(nn.Module):
    """A residual branch that ends with a norm and its activation."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), NormAct(8)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.norm(self.conv(x))).mean((2, 3))


@pytest.mark.parametrize("gate", ["layer", "channel", "both"])
def test_a_norm_whose_activation_a_gate_closes_vanishes(gate):
    gates = gatedconv.gate_model(NormActBlock().eval(), gate, example_input=IMAGES)
    masks = {n: torch.zeros(g.num_gates) > 0 for n, g in gatedconv.gates(gates).items()}
    frozen = gatedconv.freeze(gates, masks=masks)
    small = gatedconv.compact(frozen, IMAGES)
    assert_close(small(IMAGES), frozen(IMAGES))
    assert not any(isinstance(module, NormAct) for module in small.modules())


def test_a_norm_with_its_activation_becomes_smaller_with_the_layer_in_front():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), NormAct(8), nn.Conv2d(8, 4, 1), nn.Flatten()).eval()
    gates = gatedconv.gate_model(model, "channel", example_input=IMAGES)
    masks = {n: torch.arange(g.num_gates) % 2 == 0 for n, g in gatedconv.gates(gates).items()}
    frozen = gatedconv.freeze(gates, masks=masks)
    small = gatedconv.compact(frozen, IMAGES)
    sizes = {path: len(m.weight) for path, m in small.named_modules() if isinstance(m, (nn.Conv2d, NormAct))}
    assert sorted(sizes.values()) == [4, 4, 4]
    expected = float(gatedconv.expected_macs(gates, {n: m.double() for n, m in masks.items()}))
    assert expected == pytest.approx(gatedconv.count_macs(small, IMAGES[:1]), **WHOLE)
    assert not gates.conversion.estimated
    assert_close(small(IMAGES), frozen(IMAGES))


class Standardized(nn.Conv2d):
    """A convolution whose weights are standardized in every forward, as those of NFNets."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / weight.square().mean((1, 2, 3), keepdim=True).sqrt()
        return nn.functional.conv2d(x, weight, self.bias, self.stride, self.padding)


def test_no_macs_are_promised_of_layers_whose_weights_depend_on_all_channels():
    layers = [Standardized(3, 8, 3), nn.ReLU(), Standardized(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)]
    model = gatedconv.gate_model(nn.Sequential(*layers).eval(), "channel", example_input=IMAGES)
    masks = {n: torch.arange(g.num_gates) % 2 == 0 for n, g in gatedconv.gates(model).items()}
    small = gatedconv.compact(gatedconv.freeze(model, masks=masks), IMAGES)
    expected = float(gatedconv.expected_macs(model, {n: m.double() for n, m in masks.items()}))
    assert expected == pytest.approx(gatedconv.count_macs(small, IMAGES[:1]), **WHOLE)


class SameWithAnEvenKernel(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, (4, 2), padding="same", dilation=(1, 3))
        self.norm, self.head = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head(x + self.norm(self.conv(x)).relu())


def test_a_closed_convolution_that_pads_an_even_kernel():
    images = torch.randn(2, 3, 8, 8)
    gated = gatedconv.gate_model(SameWithAnEvenKernel().eval(), "channel", example_input=images)
    masks = {name: torch.zeros(gate.num_gates, dtype=torch.bool) for name, gate in gatedconv.gates(gated).items()}
    frozen = gatedconv.freeze(gated, masks=masks)
    assert_close(gatedconv.compact(frozen, images)(images), frozen(images))
