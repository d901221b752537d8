"""How an engine is built, called, moved about and refused."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import gatedconv
from gatedconv.engine import partition
from gatedconv.ops import plan
from tests.engine.nets import Residual, error, settle
from tests.tolerances import tolerance


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return settle(gatedconv.models.resnet20())


@pytest.fixture(scope="module")
def engine(model):
    return gatedconv.Engine(model, torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: torch.cat([x, x], 3)[:, :, :, ::2],
        lambda x: x.transpose(2, 3),
        lambda x: x[:1].expand(4, 3, 32, 32),
        lambda x: x.flip(0)[:, [2, 0, 1]],
    ],
    ids=["channels_last", "every other column", "transposed", "expanded", "picked"],
)
def test_any_strides(engine, model, layout):
    x = layout(torch.randn(4, 3, 32, 32))
    result = engine(x)
    assert result.is_contiguous()
    assert error(result, model, x) <= tolerance()


def test_an_empty_batch(engine):
    assert engine(torch.empty(0, 3, 32, 32)).shape == (0, 10)


def test_the_input_is_left_alone(engine):
    x = torch.randn(2, 3, 32, 32)
    kept = x.clone()
    engine(x)
    assert torch.equal(x, kept)


@pytest.mark.parametrize(
    ("x", "kind", "words"),
    [
        ([1.0], TypeError, "tensor"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.float64), TypeError, "float32"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "uint8"),
        (torch.zeros(3, 8, 8), ValueError, r"\(N, C, H, W\)"),
        (torch.zeros(1, 4, 8, 8), ValueError, "3 channels"),
        (torch.zeros(1, 3, 8, 8, device="meta"), ValueError, "meta"),
        (torch.zeros(1, 3, 8, 8).to_sparse(), TypeError, "dense"),
        (torch.zeros(1, 3, 8, 8).to_mkldnn(), TypeError, "dense"),
        (torch.zeros(1, 3, 0, 8), ValueError, "0 x 8 pixels is empty"),
        (torch.zeros(0, 3, 8, 0), ValueError, "8 x 0 pixels is empty"),
        (torch.zeros(1, 1, 1, 1).expand(1, 3, 300_000, 8), ValueError, "at most 262144 a side"),
        (torch.zeros(1, 1, 1, 1).expand(2**45, 3, 8, 8), ValueError, "no room"),
    ],
)
def test_what_is_no_input(engine, x, kind, words, capfd):
    with pytest.raises(kind, match=words):
        engine(x)
    assert capfd.readouterr() == ("", "")


CONVERSIONS = {
    "double": lambda e: e.double(),
    "half": lambda e: e.half(),
    "to a dtype": lambda e: e.to(torch.bfloat16),
    "to a device": lambda e: e.to("meta"),
    "inside of a model": lambda e: nn.Sequential(nn.ReLU(), e).double(),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_conversion_is_refused_and_changes_nothing(name):
    engine = gatedconv.Engine(nn.Sequential(nn.Conv2d(3, 4, 3), Unknown(4)), torch.zeros(1, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    before = engine(x)
    with pytest.raises(TypeError, match="build a new Engine"):
        CONVERSIONS[name](engine)
    assert torch.equal(engine(x), before)
    for same in (engine.to("cpu"), engine.float(), engine.cpu(), engine.to(torch.float32), engine.share_memory()):
        assert same is engine and torch.equal(engine(x), before)


class BroadcastAtOtherSizes(nn.Module):
    """A map and its mean, which have one size where the map is of one pixel."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 12)

    def forward(self, x):
        y = self.conv(x)
        return y + nn.functional.adaptive_avg_pool2d(y, 1)


@pytest.mark.parametrize(
    "make",
    [BroadcastAtOtherSizes, lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(10), nn.Flatten())],
    ids=["sum", "flattening"],
)
def test_what_holds_at_the_examples_size_alone(make):
    net = make().eval()
    engine = gatedconv.Engine(net, torch.zeros(1, 3, 12, 12))
    assert engine.plans
    for size in (12, 16, 32):
        x = torch.randn(2, 3, size, size)
        assert error(engine(x), net, x) <= tolerance()


def test_a_compiled_model_is_packed_like_the_model(model, engine):
    compiled = gatedconv.Engine(torch.compile(model), torch.zeros(1, 3, 32, 32))
    x = torch.randn(2, 3, 32, 32)
    assert compiled.reason is None and torch.equal(compiled(x), engine(x))


def test_an_input_smaller_than_a_kernel():
    engine = gatedconv.Engine(nn.Sequential(nn.Conv2d(3, 4, 5)), torch.zeros(1, 3, 9, 9))
    with pytest.raises(ValueError, match="4 x 9"):
        engine(torch.zeros(1, 3, 4, 9))


def test_a_linear_layer_after_a_map_of_another_size():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 2))
    engine = gatedconv.Engine(net, torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="does not take 3 x 8 x 8: .*shapes cannot be multiplied"):
        engine(torch.zeros(1, 3, 8, 8))
    x = torch.randn(2, 3, 5, 5)
    assert error(engine(x), net, x) <= tolerance()


def test_what_cannot_be_built():
    x = torch.zeros(1, 3, 32, 32)
    with pytest.raises(TypeError, match="Module"):
        gatedconv.Engine("net", x)
    with pytest.raises(ValueError, match="freeze"):
        gatedconv.Engine(gatedconv.models.resnet20(gate="layer"), x)
    with pytest.raises(ValueError, match="N, C, H, W"):
        gatedconv.Engine(gatedconv.models.resnet20(), x[0])
    with pytest.raises(TypeError, match="float64"):
        gatedconv.Engine(gatedconv.models.resnet20(), x.double())


def test_grad_modes_in_any_mix(model):
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    modes = (torch.enable_grad, torch.no_grad, torch.inference_mode)
    results = []
    for build in modes:
        with build():
            built = gatedconv.Engine(model, x.detach())
        for call in modes:
            with call():
                results.append(built(x))
    assert all(not result.requires_grad for result in results)
    assert all(torch.equal(result.clone(), results[0].clone()) for result in results)


def test_two_threads_share_one_engine(engine, model):
    inputs = [torch.randn(n, 3, 32, 32) for n in (1, 2, 5, 8)]
    expected = [engine(x) for x in inputs]
    wrong = []

    def work(start):
        for i in range(12):
            x, result = inputs[(start + i) % 4], expected[(start + i) % 4]
            if not torch.equal(engine(x), result):
                wrong.append((start, i))

    workers = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_engines_of_their_own_in_several_threads(model):
    example = torch.randn(2, 3, 32, 32)
    engines = [gatedconv.Engine(model, example, threads=threads) for threads in (1, 1, 2, 3)]
    inputs = [torch.randn(n, 3, 32, 32) for n in (1, 3, 4)]
    expected = [[engine(x) for x in inputs] for engine in engines]
    wrong = []

    def work(engine, results):
        for i in range(12):
            if not torch.equal(engine(inputs[i % 3]), results[i % 3]):
                wrong.append(i)

    pairs = zip(engines, expected, strict=True)
    workers = [threading.Thread(target=work, args=pair) for pair in pairs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_engines_that_are_built_in_several_threads(model):
    x, found, call = torch.randn(2, 3, 32, 32), [], nn.Module.__call__
    workers = [threading.Thread(target=lambda: found.append(gatedconv.Engine(model, x)(x))) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 3 and all(error(result, model, x) <= tolerance() for result in found)
    assert nn.Module.__call__ is call


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))], ids=["copy", "pickle"])
def test_copies_compute_the_same(engine, copied):
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(copied(engine)(x), engine(x))


def test_an_engine_in_a_file(engine, model, tmp_path):
    gatedconv.save(engine, tmp_path / "engine.safetensors")
    loaded = gatedconv.load(tmp_path / "engine.safetensors")
    x = torch.randn(3, 3, 32, 32)
    assert isinstance(loaded, gatedconv.Engine) and loaded.example_size == engine.example_size
    assert torch.equal(loaded(x), engine(x))
    gatedconv.save(model, tmp_path / "model.safetensors")
    assert not isinstance(gatedconv.load(tmp_path / "model.safetensors"), gatedconv.Engine)
    other = gatedconv.Engine(nn.Sequential(nn.Conv2d(3, 4, 3)), x)
    gatedconv.save(other, tmp_path / "other.safetensors")
    assert torch.equal(gatedconv.load(tmp_path / "other.safetensors")(x), other(x))


def test_train_changes_nothing(engine):
    x = torch.randn(2, 3, 32, 32)
    before = engine(x)
    assert not engine.train().training
    assert torch.equal(engine(x), before)


def test_later_changes_of_the_model_do_not_reach_the_engine():
    net = settle(nn.Sequential(nn.Conv2d(3, 8, 3)))
    x = torch.randn(1, 3, 8, 8)
    engine = gatedconv.Engine(net, x)
    before = engine(x)
    with torch.no_grad():
        net[0].weight.zero_()
    assert torch.equal(engine(x), before)


class Unknown(nn.Module):
    """A product with a cosine, which no plan knows."""

    def __init__(self, channels):
        super().__init__()
        self.up = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x * torch.cos(self.up(x))


def test_the_unknown_runs_in_pytorch():
    net = settle(nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), Residual(16, 8), Unknown(16), Residual(16, 8)))
    x = torch.randn(2, 3, 12, 12)
    engine = gatedconv.Engine(net, x)
    assert error(engine(x), net, x) <= tolerance()
    text = engine.describe()
    assert "PyTorch: cos" in text and "PyTorch: mul" in text and "plan0" in text and "plan1" in text
    assert "2 operations" in text


def test_the_description_is_of_the_threads_that_the_engine_uses():
    net = settle(nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), Residual(16, 8)))
    x = torch.randn(2, 3, 12, 12)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = gatedconv.Engine(net, x).describe()
        torch.set_num_threads(3)
        assert gatedconv.Engine(net, x, threads=1).describe() == single != gatedconv.Engine(net, x).describe()
    finally:
        torch.set_num_threads(before)


def test_autocast_changes_nothing():
    net = settle(nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), Unknown(16), Residual(16, 8)))
    x = torch.randn(2, 3, 12, 12)
    engine = gatedconv.Engine(net, x)
    with torch.autocast("cpu", torch.bfloat16):
        result = engine(x)
        built = gatedconv.Engine(net, x)
    assert result.dtype == torch.float32 and torch.equal(result, engine(x)) and torch.equal(built(x), result)


@pytest.mark.parametrize("tune", [False, True])
def test_the_default_dtype_changes_nothing(tune, model, monkeypatch, tmp_path):
    monkeypatch.setenv("GATEDCONV_CACHE", str(tmp_path))
    x = torch.randn(2, 3, 32, 32)
    engine = gatedconv.Engine(model, x)
    torch.set_default_dtype(torch.float64)
    try:
        built = gatedconv.Engine(model, x, tune=tune)
        assert built.reason is None and len(built.plans) == 1
        assert error(built(x), model, x) <= tolerance() if tune else torch.equal(built(x), engine(x))
    finally:
        torch.set_default_dtype(torch.float32)


class Branching(nn.Module):
    """The way that the data takes depends on the data."""

    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_model_without_a_graph_runs_in_pytorch():
    engine = gatedconv.Engine(nn.Sequential(nn.Conv2d(3, 4, 1), Branching()), torch.zeros(1, 3, 4, 4))
    x = torch.randn(1, 3, 4, 4)
    assert "Everything runs in PyTorch: the model cannot be written as a graph: its code reads" in engine.describe()
    assert torch.equal(engine(x), engine.source(x))


@pytest.mark.parametrize("wrong", ["stem.0", "2.conv2", "4"])
def test_a_plan_that_is_wrong_is_left_to_pytorch_and_the_layer_named(wrong, monkeypatch):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.norm, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return torch.relu(x + self.conv2(torch.relu_(self.norm(self.conv1(x)))))

    net = nn.Sequential()
    net.add_module("stem", nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
    for name, layer in (("1", Block()), ("2", Block()), ("3", nn.Conv2d(8, 8, 3, 2)), ("4", nn.Conv2d(8, 4, 1))):
        net.add_module(name, layer)
    read = partition.read_layer

    def misread(node, traced):
        layer = read(node, traced)
        if layer is not None and layer.name == wrong:
            layer.weight = layer.weight * 1.01
        return layer

    monkeypatch.setattr(partition, "read_layer", misread)
    x = torch.randn(2, 3, 16, 16)
    with pytest.warns(UserWarning, match=rf"everything runs in PyTorch.* on example_input, first at {wrong}$"):
        engine = gatedconv.Engine(net.eval(), x)
    assert torch.equal(engine(x), net(x))
    assert f"first at {wrong}" in engine.describe()
    with pytest.warns(UserWarning, match="everything runs in PyTorch"):  # a copy is packed anew
        assert torch.equal(copy.deepcopy(engine)(x), net(x))

    def fail(*_):
        raise RuntimeError("no plan of a part")

    monkeypatch.setattr("gatedconv.engine.engine.first_wrong_layer", fail)
    with pytest.warns(UserWarning, match="first at a layer that could not be found"):
        assert torch.equal(gatedconv.Engine(net, x)(x), net(x))


def test_float64_runs_in_pytorch():
    net = nn.Conv2d(3, 4, 3).double()
    x = torch.randn(1, 3, 5, 5, dtype=torch.float64)
    engine = gatedconv.Engine(net, x)
    assert "float64" in engine.describe()
    assert torch.equal(engine(x), net(x))


def test_a_value_that_is_overwritten_and_read_again():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 3, 1, 1), nn.Conv2d(6, 6, 3, 1, 1)

        def forward(self, x):
            a = self.a(x)
            b = self.b(torch.relu_(a))
            return torch.relu(b + a) + b  # reads a after relu_ and b twice

    net = Net().eval()
    x = torch.randn(2, 3, 9, 9)
    engine = gatedconv.Engine(net, x)
    assert "Nothing is left to PyTorch" in engine.describe()
    assert error(engine(x), net, x) <= tolerance()


def test_describe_names_kernels_and_sizes(engine):
    text = engine.describe()
    for words in ("Winograd F(4x4)", "direct 3x3", "layer3.2.conv2", "M MACs", "workspace", "MiB", plan.plan_isa()):
        assert words in text


def test_an_unknown_instruction_set_is_refused(engine, monkeypatch):
    monkeypatch.setenv("GATEDCONV_ISA", "mmx")
    with pytest.raises(RuntimeError, match="GATEDCONV_ISA"):
        engine(torch.zeros(1, 3, 32, 32))


def test_the_workspace_is_bounded_and_given_back(engine):
    program = engine.plans[0].program
    of_one = plan.plan_workspace((1, 3, 32, 32), program, 2)
    assert plan.plan_workspace((4096, 3, 32, 32), program, 2) <= 16 * of_one
    plan.plan_release()
    engine(torch.zeros(1, 3, 32, 32))
    assert plan.plan_release() > 0
    assert plan.plan_release() == 0


def test_an_example_that_the_model_does_not_take_is_refused():
    with pytest.raises(ValueError, match=r"Engine: Sequential does not run on example_input \(\(1, 4, 8, 8\)"):
        gatedconv.Engine(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval(), torch.zeros(1, 4, 8, 8))
