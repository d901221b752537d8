"""Files made by hand or damaged: each loads right or raises one ValueError, and nothing runs that a file names."""

from __future__ import annotations

import json
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import gatedconv


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )


@pytest.fixture
def file(tmp_path):
    """A compact network's file: path, its tensors and its description."""
    torch.manual_seed(0)
    model = network().eval()
    images = torch.randn(2, 3, 8, 8)
    gated = gatedconv.gate_model(model, "channel", example_input=images, verify=False)
    masks = {n: torch.arange(g.num_gates) % 2 == 0 for n, g in gatedconv.gates(gated).items()}
    small = gatedconv.compact(gatedconv.freeze(gated, masks=masks), images, verify=False)
    path = tmp_path / "a.safetensors"
    gatedconv.save(small, path)
    with safe_open(path, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        description = json.loads(opened.metadata()["gatedconv"])
    return path, tensors, description, small, images


def rewrite(path, tensors, description):
    save_file(tensors, path, {"gatedconv": json.dumps(description)})


@pytest.mark.parametrize(
    "target",
    [
        "aten.from_file.default",
        "aten.save.default",
        "aten.fill_.Scalar",
        "aten.empty.memory_format",
        "prim.device.default",
        "operator.attrgetter",
        "os.system",
        "torch.load",
    ],
)
def test_functions_outside_the_list_are_refused(file, tmp_path, target):
    path, tensors, description, *_ = file
    nodes = description["graph"]["nodes"]
    victim = tmp_path / "created"
    nodes.insert(1, ["evil", "call_function", target, {"tuple": [str(victim), True, 64]}, {"dict": {}}])
    rewrite(path, tensors, description)
    with pytest.raises(ValueError, match="damaged"):
        gatedconv.load(path)
    assert not victim.exists()


def test_strings_layers_methods_and_sizes_outside_the_list_are_refused(file):
    path, tensors, description, *_ = file
    modules = description["graph"]["modules"]
    name = next(n for n, spec in modules.items() if spec[0] == "torch.nn.ReLU")
    specs = [
        ["torch.nn.DataParallel", {"dict": {}}, []],
        ["torch.nn.Linear", {"dict": {"in_features": 1 << 40, "out_features": 1}}, []],
        ["torch.nn.GELU", {"dict": {"approximate": "/etc/passwd"}}, []],
    ]
    for spec in specs:
        modules[name] = spec
        rewrite(path, tensors, description)
        with pytest.raises(ValueError, match="damaged"):
            gatedconv.load(path)


def mutated(value, rng, strings):
    """The description with one of its leaves replaced."""
    places = []

    def walk(item, parent, key):
        if isinstance(item, (dict, list)):
            for k, part in item.items() if isinstance(item, dict) else enumerate(item):
                walk(part, item, k)
        elif parent is not None:
            places.append((parent, key))

    walk(value, None, None)
    parent, key = rng.choice(places)
    parent[key] = rng.choice([None, -1, 0, 3, 1 << 50, 1.5, True, [], {}, {"node": "x"}, rng.choice(strings)])
    return value


@pytest.mark.parametrize("seed", range(40))
def test_a_changed_description_loads_or_is_a_value_error(file, seed):
    path, tensors, description, small, images = file
    rng = random.Random(seed)
    rewrite(path, tensors, mutated(description, rng, ["aten.relu.default", "torch.nn.Linear", "getattr", "..", "0"]))
    for into in (None, small):
        try:
            model = gatedconv.load(path, into=into)
        except ValueError:
            continue
        assert isinstance(model, nn.Module)


def test_a_users_network_comes_back_into_its_class(file):
    path, tensors, _, small, images = file
    dense = network()
    back = gatedconv.load(path, into=dense)
    assert type(back) is nn.Sequential and back[0].out_channels == 4 and dense[0].out_channels == 8
    assert torch.equal(back(images), small.eval()(images))


@pytest.mark.parametrize(
    "changes",
    [{"widths": [3000, 3000, 3000]}, {"widths": [64, 1 << 40, 64]}, {"num_classes": 1 << 30}, {"hidden": 1 << 20}],
)
def test_a_network_of_ours_larger_than_any_is_not_built(changes, tmp_path):
    path = tmp_path / "a.safetensors"
    gatedconv.save(gatedconv.models.cifar_vgg(gate="channel"), path)
    with safe_open(path, framework="pt") as opened:
        description = json.loads(opened.metadata()["gatedconv"])
    description["model"].update(changes)
    rewrite(path, {"a": torch.zeros(1)}, description)
    with pytest.raises(ValueError, match="larger than"):
        gatedconv.load(path)
