"""export: what is written computes what the model computes, at any batch size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gatedconv
from tests.convert.networks import IMAGES, network
from tests.oracle import random_masks, randomize_statistics
from tests.tolerances import assert_close

X = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def exported(path, format):
    """What runs the file: a function of images."""
    if format == "torch":
        return torch.export.load(path).module()
    session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"input": images.numpy()})[0])


def compact_net():
    torch.manual_seed(0)
    model = gatedconv.models.ResNet(8, gate="both", input_size=(3, 16, 16)).eval()
    randomize_statistics(model, 0)
    masks = random_masks({n: g.num_gates for n, g in gatedconv.gates(model).items()}, "odd", 1)
    return gatedconv.freeze(model, masks=masks)


def test_onnx_runs_in_onnxruntime_with_standard_operators_alone(tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    frozen, path = compact_net(), tmp_path / "net.onnx"
    gatedconv.export(frozen, path, X)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    operators = {(node.domain, node.op_type) for node in model.graph.node}
    assert {domain for domain, _ in operators} == {""} and not {"If", "Loop"} & {op for _, op in operators}
    assert list(tmp_path.iterdir()) == [path]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        (out,) = session.run(None, {"input": X[:batch].numpy()})
        assert_close(out, frozen(X[:batch]))


def test_torch_export_round_trip(tmp_path):
    frozen = compact_net()
    gatedconv.export(frozen, tmp_path / "net.pt2", X, format="torch")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    for batch in (1, 3):
        assert_close(loaded(X[:batch]), frozen(X[:batch]))


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_height_and_width_are_free_where_the_network_leaves_them_free(tmp_path, format):
    model = network("residual")
    gated = gatedconv.gate_model(model, "both", example_input=IMAGES)
    masks = random_masks({n: g.num_gates for n, g in gatedconv.gates(gated).items()}, "odd", 1)
    frozen, path = gatedconv.freeze(gated, masks=masks), tmp_path / "net"
    if format == "onnx":
        pytest.importorskip("onnxscript")
    gatedconv.export(frozen, path, IMAGES, format=format)
    run = exported(path, format)
    for shape in ((1, 3, 12, 12), (3, 3, 20, 14), (2, 3, 9, 33)):
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert_close(run(images), frozen(images))


class Lines(nn.Module):
    """Lines of text, 8 pixels high, as wide as they are."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 6, (8, 3)), nn.ReLU())

    def forward(self, x):
        x = self.net(x)
        assert x.shape[2] == 1
        return x.squeeze(2).permute(2, 0, 1)


class Frames(nn.Module):
    """Every four images are a clip."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU())

    def forward(self, x):
        x = self.net(x)
        return x.view(x.shape[0] // 4, 4, *x.shape[1:]).amax(1).mean((2, 3))


class Four(Frames):
    """Four images are one clip."""

    def forward(self, x):
        x = self.net(x)
        return x.view(1, 4, *x.shape[1:]).amax(1).mean((2, 3))


@pytest.mark.parametrize("format", ["onnx", "torch"])
@pytest.mark.parametrize(
    ("model", "size", "others", "refused"),
    [
        (Lines, (2, 3, 8, 20), [(1, 3, 8, 20), (3, 3, 8, 33)], (2, 3, 9, 20)),
        (Frames, (4, 3, 8, 8), [(4, 3, 8, 8)], (5, 3, 8, 8)),
        (Four, (4, 3, 8, 8), [(4, 3, 10, 12)], (5, 3, 8, 8)),
    ],
)
def test_what_the_network_fixes_is_fixed_and_no_more(model, size, others, refused, format, tmp_path):
    model, path = model().eval(), tmp_path / "net.pt2"
    if format == "onnx":
        pytest.importorskip("onnxscript")
    gatedconv.export(model, path, torch.randn(size), format=format)
    run = exported(path, format)
    for shape in (size, *others):
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert_close(run(images), model(images))
    with pytest.raises(Exception, match="(?i)shape|dimension|guard|expected"):  # of either runtime
        run(torch.randn(refused))


@pytest.mark.slow
def test_a_package_of_aot_inductor_takes_any_batch(tmp_path):
    model = network("residual")
    gated = gatedconv.gate_model(model, "both", example_input=IMAGES)
    frozen = gatedconv.freeze(
        gated, masks=random_masks({n: g.num_gates for n, g in gatedconv.gates(gated).items()}, "odd", 1)
    )
    gatedconv.export(frozen, tmp_path / "net.pt2", IMAGES, format="aoti")
    loaded = torch._inductor.aoti_load_package(str(tmp_path / "net.pt2"))
    for batch in (1, 5):
        images = torch.randn(batch, *IMAGES.shape[1:])
        expected = frozen(images).detach()
        assert_close(loaded(images), expected)
        assert (expected - model(images)).abs().max() > 1e-2
    assert [path.name for path in tmp_path.iterdir()] == ["net.pt2"]


class Branching(nn.Module):
    """What it does depends on the numbers of its input: no graph holds that."""

    def forward(self, x):
        return x * 2 if x.mean() > 0 else x


@pytest.mark.parametrize(
    ("model", "format", "why"),
    [
        (Branching(), "onnx", "Branching cannot be written as 'onnx': .*data-dependent"),
        (Branching(), "torch", "Branching cannot be written as 'torch': .*data-dependent"),
        (nn.Sequential(nn.AdaptiveMaxPool2d(3)), "onnx", "Sequential cannot be .*adaptive_max_pool2d"),
    ],
)
def test_what_an_exporter_cannot_write_is_one_clear_error(model, format, why, tmp_path, capfd):
    if format == "onnx":
        pytest.importorskip("onnxscript")
    with pytest.raises(ValueError, match=why) as caught:
        gatedconv.export(model, tmp_path / "m", X, format=format)
    assert "\n" not in str(caught.value) and caught.value.__cause__ is not None
    assert not list(tmp_path.iterdir()) and not any(capfd.readouterr())


def test_the_callers_model_stays_in_its_mode(tmp_path):
    model = gatedconv.models.ResNet(8).train()
    gatedconv.export(model, tmp_path / "net.pt2", X, format="torch")
    assert model.training and model.layer1[0].bn1.training


def test_bad_arguments_are_named(tmp_path):
    model = gatedconv.models.resnet20(gate="layer")
    with pytest.raises(ValueError, match="format must be one of onnx, torch, aoti, plan, got 'tflite'"):
        gatedconv.export(model, tmp_path / "m", X, format="tflite")
    with pytest.raises(ValueError, match="freeze the model first; gate 'layer1.0.layer_gate'"):
        gatedconv.export(model, tmp_path / "m", X)
    with pytest.raises(TypeError, match="example_input must be a tensor"):
        gatedconv.export(gatedconv.models.resnet20(), tmp_path / "m", (1, 3, 16, 16))
    with pytest.raises(IsADirectoryError, match="is a folder"):
        gatedconv.export(gatedconv.models.resnet20(), tmp_path, X)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_a_network_that_keeps_tensors_of_its_last_forward_is_copied(tmp_path):
    """torch.nn.utils.weight_norm leaves the weight that it computes: no leaf, which copy.deepcopy refuses."""
    layers = [torch.nn.utils.weight_norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten()]
    gated = gatedconv.gate_model(nn.Sequential(*layers), "channel", example_input=X)
    gated.train()(X)
    gatedconv.save(gated, tmp_path / "gated.safetensors")
    scores = gatedconv.gating.fisher_information(gated, [(X, X[:, 0, 0, 0])], lambda y, _: y.square().mean())
    assert {name: len(score) for name, score in scores.items()} == {"0.channel_gate": 8}
    masks = {"0.channel_gate": torch.arange(8) % 2 == 0}
    small = gatedconv.compact(gatedconv.freeze(gated, masks=masks), X)
    small.train()(X)
    gatedconv.export(small, tmp_path / "small.pt2", X, format="torch")
    assert_close(exported(tmp_path / "small.pt2", "torch")(X), small.eval()(X))


@pytest.mark.parametrize("name", ["mean", "std"])
def test_an_array_is_refused_where_it_is_not_kept(name, tmp_path):
    numpy = pytest.importorskip("numpy")
    with pytest.raises(ValueError, match="kept in a plan alone"):
        gatedconv.export(compact_net(), tmp_path / "net.onnx", X, **{name: numpy.ones(3)})


def test_an_output_with_the_inputs_name_gets_another(tmp_path):
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Named(torch.nn.Module):
        def forward(self, x):
            return {"input": x * 2, "mean": x.mean((2, 3))}

    gatedconv.export(Named().eval(), tmp_path / "a.onnx", torch.zeros(1, 3, 8, 8))
    session = ort.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["output_input", "mean"]


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_the_average_of_weights_is_exported(format, tmp_path):
    """AveragedModel.forward takes any arguments."""
    average = torch.optim.swa_utils.AveragedModel(network("relu")).eval()
    gated = gatedconv.gate_model(average, "channel", example_input=IMAGES)
    masks = random_masks({n: g.num_gates for n, g in gatedconv.gates(gated).items()}, "odd", 1)
    small = gatedconv.compact(gatedconv.freeze(gated, masks=masks).eval(), IMAGES)
    gatedconv.export(small, tmp_path / "m.pt2", IMAGES, format)
    with torch.no_grad():
        assert_close(exported(tmp_path / "m.pt2", format)(IMAGES), small(IMAGES))
