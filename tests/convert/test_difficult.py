"""gate_model and compact on what other networks do not have: hooks, several outputs, empty batches, other types."""

from __future__ import annotations

import copy
import logging
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import gatedconv
from tests.convert.networks import IMAGES, Residual, network
from tests.tolerances import assert_close


def prepared(model):
    """The model with norm weights and statistics as after training, in eval mode."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d)) and module.weight is not None:
            module.weight.data = torch.rand(module.weight.shape, generator=generator) + 0.5
            module.bias.data = torch.rand(module.bias.shape, generator=generator) - 0.5
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.rand(module.num_features, generator=generator) - 0.5)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return model.eval()


def odd_masks(model):
    gates = gatedconv.gates(model).items()
    return {name: torch.arange(gate.num_gates) % 3 != 1 for name, gate in gates}


def tensors(output):
    if isinstance(output, torch.Tensor):
        return [output]
    return [t for part in (output.values() if isinstance(output, dict) else output) for t in tensors(part)]


def assert_compact_is_exact(model, gate="channel", images=IMAGES):
    """Gated equals the model, compact equals frozen, also for other batches; masks matter. Returns the compact one."""
    gated = gatedconv.gate_model(model, gate, example_input=images)
    more = torch.randn(5, *images.shape[1:], generator=torch.Generator().manual_seed(9))
    frozen = gatedconv.freeze(gated, masks=odd_masks(gated))
    small = gatedconv.compact(frozen, images)
    with torch.no_grad():
        for one, other in zip(tensors(gated(images)), tensors(model(images)), strict=True):
            torch.testing.assert_close(one, other)
        for one, other, dense in zip(tensors(small(more)), tensors(frozen(more)), tensors(model(more)), strict=True):
            assert_close(one, other)
            assert (dense - other).abs().max() > 1e-3
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    return small


class Heads(nn.Module):
    """A feature pyramid with a dict of two outputs, and a classifier as well."""

    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.two = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU(inplace=True))
        self.side1, self.side2 = nn.Conv2d(8, 6, 1), nn.Conv2d(12, 6, 1)
        self.out1, self.out2 = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        a = self.one(x)
        b = self.two(a)
        top = self.side2(b)
        fine = self.side1(a) + F.interpolate(top, scale_factor=2.0, mode="nearest")
        return {"fine": self.out1(fine), "coarse": self.out2(top), "label": self.fc(b.mean((2, 3)))}


def test_a_dict_of_outputs_is_kept_and_named_in_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    small = assert_compact_is_exact(prepared(Heads()))
    gatedconv.export(small, tmp_path / "heads.onnx", IMAGES)
    session = onnxruntime.InferenceSession(tmp_path / "heads.onnx", providers=["CPUExecutionProvider"])
    assert [o.name for o in session.get_outputs()] == ["fine", "coarse", "label"]
    images = torch.randn(5, 3, 12, 12)
    with torch.no_grad():
        for found, expected in zip(session.run(None, {"input": images.numpy()}), small(images).values(), strict=True):
            assert_close(torch.from_numpy(found), expected)


class OldNorm(nn.Module):
    """The weight norm of earlier PyTorch, which is a hook."""

    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.conv1 = nn.utils.weight_norm(nn.Conv2d(3, 8, 3, padding=1))
            self.conv2 = nn.utils.spectral_norm(nn.Conv2d(8, 6, 3, padding=1))
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(F.relu(self.conv2(F.relu(self.conv1(x)))).mean((2, 3)))


def test_the_old_weight_norm_is_compacted():
    torch.manual_seed(0)
    model = OldNorm()
    model(IMAGES)
    with torch.no_grad():
        model.eval()(IMAGES)
    assert_compact_is_exact(model)


def test_a_computed_weight_is_left_to_its_owner():
    """Compacting computes the weights of a copy: the model and its gated copy still compute theirs."""
    model = network("computed")
    expected = model(IMAGES)
    gated = gatedconv.gate_model(model, "channel", example_input=IMAGES)
    gatedconv.compact(gatedconv.freeze(gated, masks=odd_masks(gated)), IMAGES)
    assert torch.equal(model(IMAGES), expected) and torch.equal(gated(IMAGES), expected)
    gated.train()(IMAGES).square().mean().backward()
    assert gated.get_submodule("conv1").parametrizations.weight.original0.grad.abs().sum() > 0


def test_a_layer_with_hooks_is_left_alone():
    model = network("relu")
    model.conv2.register_forward_hook(lambda module, args, output: output + 1)
    gated = gatedconv.gate_model(model, "channel", example_input=IMAGES)
    assert "hooks" in gated.conversion.skipped["conv2"] and "bn1.channel_gate" in gatedconv.gates(gated)
    assert_compact_is_exact(model)


def test_a_layer_that_pytorch_prunes_is_left_alone_until_its_mask_is_permanent():
    model = network("relu")
    prune.l1_unstructured(model.conv2, "weight", 0.5)
    gated = gatedconv.gate_model(model, "channel", example_input=IMAGES)
    assert "prune.remove makes the masks permanent" in gated.conversion.skipped["conv2"]
    prune.remove(model.conv2, "weight")
    gated = gatedconv.gate_model(model, "channel", example_input=IMAGES)
    assert "conv2" not in gated.conversion.skipped
    assert_close(gated(IMAGES), model(IMAGES))


class Refusing(nn.Module):
    """A branch whose layers refuse an empty batch."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.InstanceNorm2d(8, affine=True)
        self.squeeze, self.end = nn.Linear(8, 8), nn.Identity()
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        h = self.norm(self.conv(x))
        weight = torch.sigmoid(self.squeeze(h.mean((2, 3)).view(h.shape[0], -1)))
        x = x + self.end(h * weight[:, :, None, None])
        return self.fc(x.mean((2, 3)))


def test_no_sample_open_is_no_error_where_a_branch_refuses_an_empty_batch():
    torch.manual_seed(0)
    model = prepared(Refusing())
    gated = gatedconv.gate_model(model, "layer", example_input=IMAGES)
    ((name, gate),) = gatedconv.gates(gated).items()
    with torch.no_grad():
        nn.init.constant_(gate.fc2.bias, -0.5)
        closed = gatedconv.freeze(gated, masks={name: torch.tensor([False])})
        for batch in (1, 4):
            images = torch.randn(batch, 3, 12, 12)
            torch.testing.assert_close(gated(images), closed(images))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types(dtype):
    model, images = network("residual").to(dtype), IMAGES.to(dtype)
    gated = gatedconv.gate_model(model, "both", example_input=images)
    assert torch.equal(gated(images), model(images))
    small = gatedconv.compact(gatedconv.freeze(gated, masks=odd_masks(gated)), images)
    frozen = gatedconv.freeze(gated, masks=odd_masks(gated))
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert_close(small(images), frozen(images), algorithm="network")
    loss = gated.train()(images).float().square().mean() + gatedconv.mac_target_loss(gated).float()
    loss.backward()
    assert torch.isfinite(loss)


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = Residual()
    with pytest.raises(ValueError, match="the model is on the meta device, without weights; load them first"):
        gatedconv.gate_model(model, "both", example_input=torch.empty(2, 3, 12, 12, device="meta"))


@pytest.mark.parametrize("name", ["residual", "unet", "shuffled"])
def test_other_sizes_of_images(name):
    model = network(name)
    gated = gatedconv.gate_model(model, "channel", example_input=IMAGES)
    frozen = gatedconv.freeze(gated, masks=odd_masks(gated))
    small = gatedconv.compact(frozen, IMAGES)
    for shape in ((1, 3, 12, 12), (3, 3, 16, 24), (2, 3, 20, 12)):
        images = torch.randn(shape)
        assert_close(small(images), frozen(images))


def test_a_compact_network_can_be_gated_and_compacted_again():
    model = network("residual")
    gated = gatedconv.gate_model(model, "channel", example_input=IMAGES)
    small = gatedconv.compact(gatedconv.freeze(gated, masks=odd_masks(gated)), IMAGES).eval()
    assert_compact_is_exact(small)


def test_a_network_with_gates_is_refused():
    gated = gatedconv.gate_model(network("residual"), "layer", example_input=IMAGES)
    for model in (gated, gatedconv.freeze(gated), gatedconv.models.resnet20(gate="layer")):
        with pytest.raises(ValueError, match="has gates already .*layer_gate.*gate='both'"):
            gatedconv.gate_model(model, "channel", example_input=IMAGES)


class Pair(nn.Module):
    def forward(self, x, y):
        return x + y


@pytest.mark.parametrize(
    ("model", "images", "message"),
    [
        (Residual(), torch.zeros(2, 1, 12, 12), r"does not run on example_input \(\(2, 1, 12, 12\)"),
        (Residual(), torch.zeros(2, 3, 12, 12, dtype=torch.float64), "does not run on example_input .*float64"),
        (Pair(), IMAGES, "does not run on example_input .*'y'"),
        (nn.Sequential(nn.LazyConv2d(4, 3)), IMAGES, "lazy layers"),
        (nn.Sequential(nn.Conv1d(3, 4, 3), nn.Conv1d(4, 4, 3)), IMAGES, "does not run"),
        (nn.Sequential(nn.ReLU()), IMAGES, "no place for a 'layer' gate"),
    ],
)
def test_a_model_that_does_not_fit_its_images_is_named(model, images, message, caplog):
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match=message):
        gatedconv.gate_model(copy.deepcopy(model), example_input=images)
    assert not caplog.records


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"include": "blocks.7"}, "match nothing.*'blocks.7'.*did you mean .*'blocks.1'"),
        ({"include": ["blocks", "conv*"]}, r"match nothing: \['conv\*'\]"),
        ({"exclude": "blocks.0.bn1"}, "match nothing.*convolutions and residual blocks"),
    ],
)
def test_names_that_match_nothing(choice, message):
    with pytest.raises(ValueError, match=message):
        gatedconv.gate_model(network("residual"), "both", example_input=IMAGES, **choice)


def test_exclude_may_name_what_include_leaves_out():
    gated = gatedconv.gate_model(
        network("residual"), "both", example_input=IMAGES, include="blocks.1", exclude=["stem", "blocks.1.conv2"]
    )
    assert {"blocks.1.layer_gate", "blocks.1.bn1.channel_gate", "blocks.1.bn3.channel_gate"} == set(
        gatedconv.gates(gated)
    )


class Auxiliary(nn.Module):
    """A second output in training alone."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.aux = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        y = self.conv(x).mean((2, 3))
        return (self.fc(y), self.aux(y)) if self.training else self.fc(y)


def test_code_that_runs_in_training_alone_is_kept():
    for model in (Auxiliary(), nn.Sequential(nn.ReLU(), Auxiliary())):
        result = gatedconv.gate_model(model, "channel", example_input=IMAGES)
        assert isinstance(result.train()(IMAGES), tuple) and isinstance(result.eval()(IMAGES), torch.Tensor)


def test_an_exported_program_is_refused():
    program = torch.export.export(network("unet"), (IMAGES,))
    with pytest.raises(TypeError, match="ExportedProgram"):
        gatedconv.gate_model(program, "channel", example_input=IMAGES)
    with pytest.raises(ValueError, match="no place for a 'channel' gate in GraphModule"):
        gatedconv.gate_model(program.module(), "channel", example_input=IMAGES)


def test_layers_that_are_called_by_keyword():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x):
            return x + self.norm2(self.conv2(input=self.norm1(self.conv1(input=x)).relu()))

    model = prepared(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), Block(), nn.Conv2d(8, 4, 1)))
    x = torch.randn(2, 3, 8, 8)
    for gate, position in (("both", "after"), ("both", "middle"), ("both", "before")):
        gated = gatedconv.gate_model(model, gate, position=position, example_input=x)
        assert_close(gated(x), model(x))
        frozen = gatedconv.freeze(gated, masks=odd_masks(gated))
        assert_close(gatedconv.compact(frozen, x)(x), frozen(x))


def test_a_network_that_lost_a_branch_is_gated_again():
    model = prepared(Residual().eval())
    gated = gatedconv.gate_model(model, "layer", example_input=IMAGES)
    masks = {name: torch.tensor([place > 0]) for place, name in enumerate(gatedconv.gates(gated))}
    small = gatedconv.compact(gatedconv.freeze(gated, masks=masks), IMAGES)
    for gate in ("layer", "channel"):
        assert_close(gatedconv.gate_model(small, gate, example_input=IMAGES)(IMAGES), small(IMAGES))


def test_threads_do_not_read_each_others_decisions():
    """Another thread runs the network between the start of a branch and its end."""
    model = prepared(Residual().eval())
    gated = gatedconv.gate_model(model, "layer", example_input=IMAGES)
    path = next(iter(gatedconv.gates(gated))).rpartition(".")[0]

    def interrupt(module, args, output):
        if threading.current_thread() is threading.main_thread():
            other = threading.Thread(target=lambda: torch.no_grad()(gated)(IMAGES))
            other.start(), other.join()

    gated.get_submodule(path).conv1.register_forward_hook(interrupt)
    with torch.no_grad(), pytest.raises(RuntimeError, match="two threads run a network with gated branches"):
        gated(IMAGES)


def test_a_second_round_of_pruning_is_saved(tmp_path):
    small = prepared(Residual().eval())
    for gate in ("channel", "layer"):
        gated = gatedconv.gate_model(small, gate, example_input=IMAGES)
        masks = {name: torch.arange(g.num_gates) % 2 == 1 for name, g in gatedconv.gates(gated).items()}
        small = gatedconv.compact(gatedconv.freeze(gated, masks=masks), IMAGES)
        gatedconv.save(small, tmp_path / "small.safetensors")
        for loaded in (
            gatedconv.load(tmp_path / "small.safetensors"),
            gatedconv.load(tmp_path / "small.safetensors", into=prepared(Residual().eval())),
        ):
            assert_close(loaded.eval()(IMAGES), small(IMAGES))
