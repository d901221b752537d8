"""Files of graph networks: they come back without their code, and bad ones are refused."""

from __future__ import annotations

import copy
import functools
import json
import struct
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import gatedconv
from tests.convert.networks import IMAGES, NETWORKS, network
from tests.oracle import random_masks
from tests.tolerances import assert_close


@functools.cache
def stages(name, gate="channel"):
    gated = gatedconv.gate_model(network(name), gate, example_input=IMAGES)
    masks = random_masks({n: g.num_gates for n, g in gatedconv.gates(gated).items()}, "odd", 3)
    frozen = gatedconv.freeze(gated, masks=masks)
    return {"gated": gated, "frozen": frozen, "compact": gatedconv.compact(frozen, IMAGES)}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_stage_comes_back(name, tmp_path):
    for stage, model in stages(name, "both" if name == "residual" else "channel").items():
        gatedconv.save(model, tmp_path / stage)
        loaded = gatedconv.load(tmp_path / stage, into=network(name))
        assert type(loaded) is type(model)
        expected = model.state_dict()
        assert loaded.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
        with torch.no_grad():  # where its memory happens to lie decides the last bit of a sum
            assert_close(loaded(IMAGES), model(IMAGES))
        assert list(gatedconv.gates(loaded)) == list(gatedconv.gates(model))
        if stage == "gated":
            assert loaded.mac_terms == model.mac_terms and str(loaded.conversion) == str(model.conversion)
        else:
            assert loaded.consensus.masks.keys() == model.consensus.masks.keys()


@pytest.mark.parametrize("name", ["residual", "grouped", "sigmoid", "shuffled", "channels_last", "unet"])
def test_a_network_of_rounded_widths_comes_back(name, tmp_path):
    small = gatedconv.compact(stages(name)["frozen"], IMAGES, channel_multiple=4)
    gatedconv.save(small, tmp_path / "m")
    with torch.no_grad():
        assert_close(gatedconv.load(tmp_path / "m")(IMAGES), small(IMAGES))


def test_names_that_are_no_identifiers_come_back(tmp_path):
    conv, norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
    layers = {"stem-1": nn.Sequential(conv, norm), "0": nn.ReLU(), "head": nn.Conv2d(8, 4, 1)}
    model = nn.Sequential()
    for key, layer in layers.items():
        model.add_module(key, layer)
    gated = gatedconv.gate_model(model.eval(), "channel", example_input=IMAGES)
    frozen = gatedconv.freeze(gated, masks={"stem-1.1.channel_gate": torch.arange(8) % 3 > 0})
    for multiple in (1, 4):
        small = gatedconv.compact(frozen, IMAGES, channel_multiple=multiple)
        gatedconv.save(small, tmp_path / "m")
        assert torch.equal(gatedconv.load(tmp_path / "m")(IMAGES), small(IMAGES))
        torch.testing.assert_close(small(IMAGES), frozen(IMAGES))


def test_a_loaded_gated_network_trains_freezes_and_is_compacted(tmp_path):
    model = stages("residual", "both")["gated"]
    gatedconv.save(model, tmp_path / "m")
    loaded = gatedconv.load(tmp_path / "m").train()
    (loaded(IMAGES).square().mean() + gatedconv.mac_target_loss(loaded)).backward()
    masks = random_masks({n: g.num_gates for n, g in gatedconv.gates(loaded).items()}, "odd", 1)
    frozen = gatedconv.freeze(loaded.eval(), masks=masks)
    small = gatedconv.compact(frozen, IMAGES)
    with torch.no_grad():
        assert_close(small(IMAGES), frozen(IMAGES))


class Resizing(nn.Module):
    """A map is resized to the odd size of another; a part of it is written in place."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.Linear(8, 4)

    def forward(self, x):
        x = self.a(x)
        y = F.interpolate(self.b(x), size=x.shape[2:], mode="nearest")
        y[:, 2:5].relu_()
        return self.fc((x + y).flatten(2).mean(2))


def test_a_graph_of_any_size_comes_back(tmp_path):
    model = Resizing().eval()
    gatedconv.save(gatedconv.Engine(model, IMAGES), tmp_path / "m")
    source = gatedconv.load(tmp_path / "m").source
    assert "fixed_size" not in vars(source)
    for size in ((12, 12), (21, 34), (5, 1)):
        x = torch.randn(3, 3, *size)
        with torch.no_grad():
            assert_close(source(x), model(x))


def test_a_compact_network_loads_without_its_code(tmp_path):
    small = stages("shuffled")["compact"]
    gatedconv.save(small, tmp_path / "m")
    torch.save(IMAGES, tmp_path / "x")
    program = (
        "import sys, torch, gatedconv\n"
        "model, x = gatedconv.load('m'), torch.load('x', weights_only=True)\n"
        "torch.save(model(x).detach(), 'y')\n"
        "assert not any(n.startswith(('tests', 'torchvision', 'timm')) for n in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)
    assert_close(torch.load(tmp_path / "y", weights_only=True), small(IMAGES))


def edit(path, change):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    description = json.loads(header["__metadata__"]["gatedconv"])
    change(description)
    header["__metadata__"]["gatedconv"] = json.dumps(description)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def set_node(index, field, value):
    def change(description):
        description["graph"]["nodes"][index][field] = value

    return change


def new_node(op, target, *args):
    return lambda d: d["graph"]["nodes"].insert(1, ["f", op, target, {"tuple": list(args)}, {"dict": {}}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=99), "format version 99"),
        (set_node(1, 0, "a = __import__('os').system('true')"), "no name of a node"),
        (set_node(1, 2, "stem).__class__; import os"), "no path of a layer"),
        (new_node("call_function", "os.system"), "unknown function"),
        (new_node("call_function", "torch.load", "x"), "no string 'x'"),
        (new_node("call_function", "getattr", {"node": "input_1"}, "__class__"), "no string '__class__'"),
        (new_node("call_method", "__reduce__"), "no method"),
        (lambda d: d["graph"]["modules"]["stem"].__setitem__(0, "torch.nn.Module.apply"), "no layer"),
        (lambda d: d["graph"]["modules"]["stem"].__setitem__(0, "subprocess.Popen"), "unknown layer"),
        (lambda d: d["graph"].pop("nodes"), "damaged"),
        (lambda d: d.update(graph=[1, 2]), "damaged"),
    ],
)
def test_a_description_that_we_did_not_write_is_refused(change, message, tmp_path):
    gatedconv.save(stages("residual")["compact"], tmp_path / "m")
    edit(tmp_path / "m", change)
    with pytest.raises(ValueError, match=message):
        gatedconv.load(tmp_path / "m")


def test_the_products_of_an_engine_are_a_dtype(tmp_path):
    gatedconv.save(gatedconv.Engine(stages("relu")["compact"], IMAGES), tmp_path / "m")
    edit(tmp_path / "m", lambda d: d.update(products="load"))
    with pytest.raises(ValueError, match=r"damaged: KeyError\('load'\)"):
        gatedconv.load(tmp_path / "m")


def test_a_truncated_file_is_refused(tmp_path):
    gatedconv.save(stages("relu")["compact"], tmp_path / "m")
    data = (tmp_path / "m").read_bytes()
    for length in (0, 7, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "m").write_bytes(data[:length])
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            gatedconv.load(tmp_path / "m")


def test_a_module_with_code_of_its_own_needs_its_network(tmp_path):
    with pytest.raises(TypeError, match="changed nothing in this Residual, and its forward cannot be written"):
        gatedconv.save(network("residual"), tmp_path / "m")

    class Mine(nn.ReLU):
        def forward(self, x):
            return torch.vdot(x.flatten(), x.flatten()) * 0 + x.relu()

    small = copy.deepcopy(stages("relu")["compact"])
    small.set_submodule("act", Mine())
    gatedconv.save(small, tmp_path / "m")
    with pytest.raises(ValueError, match="into"):
        gatedconv.load(tmp_path / "m")
    dense = network("relu")
    dense.set_submodule("act", Mine())
    with torch.no_grad():
        assert_close(gatedconv.load(tmp_path / "m", into=dense)(IMAGES), small(IMAGES))


def test_a_network_that_a_file_does_not_fit_is_named(tmp_path):
    gatedconv.save(stages("relu")["compact"], tmp_path / "m")
    other = nn.Sequential(nn.Conv2d(3, 3, 3))
    with pytest.raises(ValueError, match=r"m holds a \w+, which does not match the Sequential passed as into=, or "):
        gatedconv.load(tmp_path / "m", into=other)


def test_tensors_of_another_kind_are_refused(tmp_path):
    gatedconv.save(stages("relu")["compact"], tmp_path / "m")
    with safe_open(tmp_path / "m", framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    name = next(name for name in tensors if name.endswith("weight"))
    save_file(tensors | {name: tensors[name].to(torch.complex64)}, tmp_path / "m", metadata)
    with pytest.raises(ValueError, match=f"{name} is torch.complex64, expected torch.float32"):
        gatedconv.load(tmp_path / "m")


@pytest.mark.parametrize("gate", ["channel", "both"])
def test_a_frozen_network_comes_back_as_a_graph(gate, tmp_path):
    frozen = stages("residual", gate)["frozen"].eval()
    gatedconv.save(frozen, tmp_path / "m")
    loaded = gatedconv.load(tmp_path / "m")
    for images in (IMAGES, torch.randn(3, 3, 40, 36)):
        with torch.no_grad():
            assert_close(loaded(images), frozen(images))


def test_the_saved_consensus_is_that_of_the_masks_in_force(tmp_path):
    gated = stages("relu")["gated"]
    masks = {name: torch.arange(gate.num_gates) % 2 == 0 for name, gate in gatedconv.gates(gated).items()}
    frozen, other = (gatedconv.freeze(gated, masks={n: m ^ flip for n, m in masks.items()}) for flip in (False, True))
    frozen.load_state_dict(other.state_dict())
    gatedconv.save(frozen, tmp_path / "m")
    found = gatedconv.load(tmp_path / "m", into=network("relu")).consensus.masks
    assert all(torch.equal(mask, ~masks[name]) for name, mask in found.items())


def test_counts_of_layers_may_be_properties_of_a_class(tmp_path):
    class Net(nn.Sequential):
        @property
        def num_channels(self):
            return self[0].out_channels

    def make():
        return Net(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()

    gated = gatedconv.gate_model(make(), "channel", example_input=IMAGES)
    frozen = gatedconv.freeze(gated, masks={"0.channel_gate": torch.arange(8) < 3})
    small = gatedconv.compact(frozen, IMAGES)
    gatedconv.save(small, tmp_path / "m")
    loaded = gatedconv.load(tmp_path / "m", into=make())
    assert loaded.num_channels == 3
    with torch.no_grad():
        assert_close(loaded(IMAGES), small(IMAGES))
