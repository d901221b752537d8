"""Code that looks at its own modules or attributes, folds other dimensions into the batch, or begins with vectors."""

from __future__ import annotations

import importlib.util
import warnings
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gatedconv
from gatedconv.convert import install
from tests.convert.unusual import Base, Shift, block, images, residual
from tests.tolerances import assert_close


class Clips(Base):
    """(N, T, 3, H, W): the frames are images of one batch."""

    def forward(self, x):
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)


class Patches(Base):
    """Each quarter of a map is an image of its own."""

    def features(self, x):
        x = self.a(x)
        n, c, h, w = x.shape
        x = x.view(n, c, 2, h // 2, 2, w // 2).permute(0, 2, 4, 1, 3, 5).reshape(n * 4, c, h // 2, w // 2)
        return self.c(self.b(x)).mean((2, 3)).view(n, 4, 8).amax(1)


class Generator(nn.Module):
    """A vector becomes an image."""

    def __init__(self):
        super().__init__()
        self.fc, self.a, self.b, self.out = nn.Linear(6, 8 * 16), block(8, 8), block(8, 8), nn.Conv2d(8, 3, 1)

    def forward(self, z):
        x = self.a(F.interpolate(self.fc(z).view(-1, 8, 4, 4), scale_factor=2.0))
        return self.out(self.b(x)).tanh()


class Spectrum(nn.Module):
    """(N, samples): a wave becomes an image."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = block(1, 8), block(8, 8), nn.Linear(8, 4)

    def forward(self, wave):
        window = torch.hann_window(16)
        x = torch.stft(wave, 16, 8, window=window, return_complex=True).abs().unsqueeze(1)
        return self.fc(self.b(self.a(x)).mean((2, 3)))


class Attributes(Base):
    """Attributes with names that a library could want."""

    def __init__(self):
        super().__init__()
        self.input_size, self.size = [3, 299, 299], (8, 8)

    def forward(self, x):
        return super().forward(x) * len(self.input_size)


class OverChildren(nn.Module):
    """A residual block whose code goes through its children."""

    def __init__(self, attribute):
        super().__init__()
        self.one, self.norm, self.two, self.attribute = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), attribute

    def layers(self):
        return self._modules.values() if self.attribute else self.children()

    def forward(self, x):
        y = x
        for layer in self.layers():
            y = layer(y)
        return x + y


class Subclass(nn.Sequential):
    """A residual block that is a Sequential."""

    def forward(self, x):
        return x + super().forward(x)


class Lists(nn.Module):
    """Layers by their names, and once more in a list, a tuple and a dict, through which the code finds them."""

    def __init__(self):
        super().__init__()
        self.stem = block(3, 8)
        for number in range(3):
            self.add_module(f"lateral{number}", nn.Conv2d(8, 8, 1))
            self.add_module(f"norm{number}", nn.BatchNorm2d(8))
        self.laterals = [self.lateral0, self.lateral1, self.lateral2][::-1]
        self.by_name = {"norms": (self.norm0, self.norm1, self.norm2)}
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        for lateral, norm in zip(self.laterals, self.by_name["norms"], strict=True):
            x = x + norm(lateral(x)).relu()
        return self.fc(x.mean((2, 3)))


@torch.compile(backend="eager")
def scaled(x):
    return x * 2 + x.relu()


class Compiled(Base):
    """A part and a function are compiled."""

    def __init__(self):
        super().__init__()
        self.b.compile(backend="eager")

    def features(self, x):
        return self.c(scaled(self.b(self.a(x)))).mean((2, 3))


class Silent(Base):
    """Its train() keeps a norm in eval, and returns nothing."""

    def train(self, mode=True):
        super().train(mode)
        self.a[1].eval()


KINDS = {
    "clips": (Clips, images(2, 3, 3, 12, 12), images(1, 5, 3, 16, 12)),
    "shift": (Shift, images(8, 3, 12, 12), images(4, 3, 14, 12)),
    "patches": (Patches, images(2, 3, 12, 12), images(3, 3, 16, 20)),
    "vectors": (Generator, images(2, 6), images(5, 6)),
    "waves": (Spectrum, images(2, 128), images(3, 200)),
    "attributes": (Attributes, images(2, 3, 12, 12), images(3, 3, 16, 12)),
    "children": (lambda: residual(OverChildren(False), OverChildren(True)), images(2, 3, 12, 12), images(3, 3, 9, 8)),
    "silent": (Silent, images(2, 3, 12, 12), images(3, 3, 9, 8)),
    "compiled": (Compiled, images(2, 3, 12, 12), images(3, 3, 9, 8)),
    "lists": (Lists, images(2, 3, 12, 12), images(3, 3, 9, 8)),
    "sequential": (
        lambda: residual(Subclass(nn.Conv2d(8, 8, 1)), Subclass(block(8, 8))),
        images(2, 3, 8, 8),
        images(3, 3, 9, 8),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_computes_what_the_model_does(kind, tmp_path):
    make, x, other = KINDS[kind]
    torch.manual_seed(0)
    model = make()
    model(x)
    model.eval()
    gated = gatedconv.gate_model(model, "both", example_input=x)
    assert type(gated) is type(model)
    assert ("count_macs fails" in gated.conversion.note) == (kind == "compiled")  # it traces the model
    for name in ("input_size", "size"):
        assert getattr(gated, name, None) == getattr(model, name, None)
    masks = {name: torch.arange(gate.num_gates) % 3 != 1 for name, gate in gatedconv.gates(gated).items()}
    frozen = gatedconv.freeze(gated, masks=masks)
    small = gatedconv.compact(frozen, x)
    gatedconv.save(small, tmp_path / "small")
    with torch.no_grad():
        for batch in (x, other):
            assert torch.equal(gated(batch), model(batch))
            loaded = [gatedconv.load(tmp_path / "small", into=make())]
            if kind != "waves":  # its strides are no part of a graph
                loaded.append(gatedconv.load(tmp_path / "small"))
            if x.dim() == 4:
                loaded.append(gatedconv.Engine(small, x))
            for found in (small, *loaded):
                if isinstance(found, gatedconv.Engine) or not vars(found).get("fixed_size") or batch is x:
                    assert_close(found(batch), frozen(batch))
    if kind == "compiled":
        return
    several = 4 if kind == "shift" else 1
    counted = gatedconv.count_macs(small, x[:several]) / several
    assert not gated.conversion.estimated
    rates = {name: mask.float() for name, mask in masks.items()}
    assert float(gatedconv.expected_macs(gated, rates)) == pytest.approx(counted)


class OverChildrenOfAParent(OverChildren):
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("kind", [OverChildren, OverChildrenOfAParent])
def test_a_layer_gate_is_no_child_of_a_block_that_goes_through_its_children(kind):
    model = residual(kind(False), kind(True))
    gated = gatedconv.gate_model(model, "layer", example_input=images(2, 3, 12, 12))
    assert list(gatedconv.gates(gated)) == ["1.one.layer_gate", "2.one.layer_gate"]


def test_modules_that_the_forward_makes_are_named():
    class Growing(Base):
        def features(self, x):
            if not hasattr(self, "late"):
                self.late = nn.Conv2d(3, 3, 1)
            return super().features(self.late(x))

    model, x = Growing().eval(), images(2, 3, 12, 12)
    with pytest.raises(ValueError, match=r"makes modules in its forward \(late\); run it"):
        gatedconv.gate_model(model, "channel", example_input=x)
    model(x)
    assert "late" in gatedconv.gate_model(model, "channel", example_input=x).conversion.gated["late.channel_gate"]


class Frozen(dict):
    """A dict that refuses to be changed."""

    def __setitem__(self, key, value):
        raise TypeError("frozen")


class Pair(NamedTuple):
    norm: nn.Module
    count: int


def test_lists_dicts_and_tuples_of_any_class_follow_what_is_replaced():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    model.settings, model.sizes = Frozen(width=4), torch.Size([1, 2])
    model.pair, model.layers = Pair(model[0], 1), [model[0]]
    with install.keeping_aliases(model):
        model[0] = nn.Identity()
    assert model.pair == Pair(model[0], 1) and model.layers[0] is model[0]
    assert type(model.settings) is Frozen and type(model.sizes) is torch.Size


def test_coordinates_in_front_of_the_images_are_no_batch():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))

        def forward(self, points, x):
            return self.net(x).mean((2, 3)) + points.mean()

    x = images(1, 3, 12, 12)
    gated = gatedconv.gate_model(Net().eval(), "channel", example_input=(torch.randn(100, 2), x))
    convolutions = 27 * 8 * 100 + 72 * 4 * 64  # of one image
    assert convolutions <= sum(term.macs for term in gated.mac_terms) <= 1.2 * convolutions


def test_an_image_in_a_tuple_is_an_image(tmp_path):
    model, x = Base().eval(), images(2, 3, 12, 12)
    gated = gatedconv.gate_model(model, "channel", example_input=(x,))
    alone = gatedconv.gate_model(model, "channel", example_input=x)
    assert gated.mac_terms == alone.mac_terms and gated.conversion == alone.conversion
    frozen = gatedconv.freeze(gated, masks={n: torch.arange(8) > 2 for n in gatedconv.gates(gated)})
    gatedconv.save(gatedconv.compact(frozen, [x]), tmp_path / "small")
    assert_close(gatedconv.load(tmp_path / "small")(x), frozen.eval()(x))


class Changing(Base):
    """It changes its input in place."""

    def forward(self, x):
        x.sub_(0.5)[:, 0].mul_(2)
        return super().forward(x)


def test_the_example_stays_as_it_is(tmp_path):
    torch.manual_seed(0)
    model, x = Changing().eval(), images(2, 3, 12, 12)
    given = x.clone()
    gated = gatedconv.gate_model(model, "both", example_input=x)
    frozen = gatedconv.freeze(
        gated, masks={n: torch.arange(g.num_gates) != 1 for n, g in gatedconv.gates(gated).items()}
    )
    small = gatedconv.compact(frozen, x)
    gatedconv.count_macs(small, x)
    engine = gatedconv.Engine(small, x)
    gatedconv.export(small, tmp_path / "net.pt2", x, format="torch")
    if importlib.util.find_spec("onnxscript"):
        gatedconv.export(small, tmp_path / "net.onnx", x, format="onnx")
    assert torch.equal(x, given)
    wanted = frozen(x.clone())
    for found in (small, engine, torch.export.load(tmp_path / "net.pt2").module()):
        assert_close(found(x.clone()), wanted)


class Same(nn.Conv2d):
    """Pads by what the image's size needs, as timm's SAME convolutions."""

    def forward(self, x):
        sizes = zip(x.shape[2:], self.kernel_size, self.stride, strict=True)
        rows, columns = (max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in sizes)
        x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride)


@pytest.mark.parametrize("size", [12, 13, 16])
def test_a_graph_whose_padding_depends_on_the_size_refuses_other_sizes(size, tmp_path):
    torch.manual_seed(0)
    layers = (Same(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), Same(8, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 4, 1))
    model, x = nn.Sequential(*layers).eval(), images(2, 3, size, size)
    gatedconv.save(gatedconv.gate_model(model, "channel", example_input=x), tmp_path / "net")
    loaded = gatedconv.load(tmp_path / "net")
    assert_close(loaded(x), model(x))
    for height, width in ((size + 1, size), (size + 32, size + 64), (size + 2, size + 3)):
        with pytest.raises(ValueError, match="holds constants for inputs of"):
            loaded(images(1, 3, height, width))


@pytest.mark.parametrize("strides", [1, 2, 3, 4])
def test_a_padding_that_depends_on_the_size_is_found_behind_plain_strides(strides, tmp_path):
    torch.manual_seed(0)
    plain = [nn.Conv2d(3 if i == 0 else 8, 8, 3, 2, 1) for i in range(strides)]
    model, x = nn.Sequential(*plain, Same(8, 8, 3, 2), nn.Conv2d(8, 4, 1)).eval(), images(2, 3, 45, 45)
    gatedconv.save(gatedconv.gate_model(model, "channel", example_input=x), tmp_path / "net")
    loaded = gatedconv.load(tmp_path / "net")
    assert_close(loaded(x), model(x))
    with pytest.raises(ValueError, match="holds constants for inputs of"):
        loaded(images(1, 3, 48, 48))


class Rows(nn.Module):
    """A flattened map as rows of one size: a larger image becomes several of them."""

    def __init__(self, reshape, between):
        super().__init__()
        self.a, self.b, self.fc, self.reshape = block(3, 8, 4), block(8, 8, 2), nn.Linear(8 * 4 * 4, 4), reshape
        self.between = between

    def forward(self, x):
        x = self.b(self.a(x))
        return self.fc(self.between(x.reshape(-1, 128) if self.reshape else x.view(-1, 128)))


@pytest.mark.parametrize("between", [nn.Identity(), nn.Dropout(), nn.Sequential(nn.ReLU(), nn.Dropout())])
@pytest.mark.parametrize("reshape", [False, True])
def test_a_flattened_map_of_another_size_is_read_as_the_model_does(reshape, between):
    torch.manual_seed(0)
    model, x = Rows(reshape, between).eval(), images(2, 3, 32, 32)
    gated = gatedconv.gate_model(model, "channel", example_input=x)
    frozen = gatedconv.freeze(gated, masks={n: torch.arange(8) > 2 for n in gatedconv.gates(gated)})
    small = gatedconv.compact(frozen, x)
    assert small.b[0].weight.shape[:2] == (5, 5)
    for batch in (x, images(3, 3, 64, 96), images(1, 3, 32, 64)):
        assert_close(small(batch), frozen(batch))


class Scaled(nn.Module):
    """(images, a number without dimensions)."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3)

    def forward(self, x, scale):
        return self.b(self.a(x).relu() * scale)


def test_an_input_without_dimensions():
    inputs = torch.randn(2, 3, 8, 8), torch.tensor(0.5)
    gated = gatedconv.gate_model(Scaled().eval(), "channel", example_input=inputs)
    masks = {name: torch.arange(gate.num_gates) % 2 == 0 for name, gate in gatedconv.gates(gated).items()}
    frozen = gatedconv.freeze(gated, masks=masks)
    small = gatedconv.compact(frozen, inputs)
    assert small.a.out_channels == 4
    assert_close(small(*inputs), frozen(*inputs))


def test_a_warning_names_the_line_of_the_caller():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    with pytest.warns(UserWarning, match="2 is gated because include names it") as caught:
        gatedconv.gate_model(net, "channel", example_input=torch.randn(1, 3, 8, 8), include=["2"])
    assert [warning.filename for warning in caught] == [__file__]


def test_outputs_without_numbers_are_no_check_and_it_says_so():
    class Finds(nn.Module):
        def __init__(self, above):
            super().__init__()
            self.conv, self.out, self.above = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 1, 1), above

        def forward(self, x):
            scores = self.out(self.conv(x))
            return scores[scores > self.above]

    x = torch.randn(2, 3, 8, 8)
    for convert in (lambda net: gatedconv.gate_model(net, "channel", example_input=x), lambda net: compacted(net, x)):
        with pytest.warns(UserWarning, match="the outputs of Finds are empty on example_input, so") as caught:
            convert(Finds(1e9).eval())
        assert {warning.filename for warning in caught} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compacted(Finds(0.0).eval(), x)


class EarlyExit(nn.Module):
    """Leaves at its first head where that is sure enough."""

    def __init__(self, sure):
        super().__init__()
        self.a, self.exit = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 10)
        self.b, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 10)
        self.sure = sure

    def forward(self, x):
        x = self.a(x).relu()
        first = self.exit(x.mean((2, 3)))
        return first if first.amax() > self.sure else self.head(self.b(x).relu().mean((2, 3)))


class OnceMore(nn.Module):
    """Calls a layer again where its output is large."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 10)

    def forward(self, x):
        x = self.conv(self.stem(x).relu()).relu()
        x = self.conv(x + 1).relu() if x.amax() > 100 else x
        return self.head(x.mean((2, 3)))


READS = "the code of {} reads numbers of its tensors, which may decide what runs; only what runs on example_input was"


def test_layers_behind_an_exit_that_the_example_takes_get_the_channels_that_they_read():
    net, x = EarlyExit(sure=-1e9).eval(), torch.randn(2, 3, 8, 8)
    with pytest.warns(UserWarning, match=READS.format("EarlyExit")) as caught:
        frozen, small = frozen_and_compact(net, x, "a.channel_gate")
    assert [warning.filename for warning in caught] == [__file__]
    assert_close(small(x), frozen(x))
    frozen.sure = small.sure = 1e9  # every image goes on
    assert_close(small(x), frozen(x))


def test_layers_that_may_be_called_again_are_removed_from_with_a_warning():
    x = torch.randn(2, 3, 8, 8)
    with pytest.warns(UserWarning, match=READS.format("OnceMore")):
        frozen, small = frozen_and_compact(OnceMore().eval(), x, "stem.channel_gate")
    assert small.stem.out_channels == 3
    assert_close(small(x), frozen(x))


def test_numbers_that_are_read_behind_the_last_layer_are_no_reason_for_a_warning():
    class Finds(nn.Sequential):
        def forward(self, x):
            scores = super().forward(x)
            return scores[0, 0] if scores.amax() > 0 else scores

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = Finds(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)).eval()
        frozen_and_compact(net, torch.randn(1, 3, 8, 8), "0.channel_gate")


def frozen_and_compact(net, x, gate):
    """A network with three of the eight channels of a gate open, and its compact form."""
    gated = gatedconv.gate_model(net, "channel", example_input=x, include=[gate.removesuffix(".channel_gate")])
    frozen = gatedconv.freeze(gated, masks={gate: torch.arange(8) < 3})
    return frozen, gatedconv.compact(frozen, x)


def compacted(net, x):
    gated = gatedconv.gate_model(net, "channel", example_input=x)
    masks = {"conv.channel_gate": torch.arange(8) < 3}
    return gatedconv.compact(gatedconv.freeze(gated, masks=masks), x)
