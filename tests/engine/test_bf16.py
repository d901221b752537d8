"""Products in bfloat16: what is rounded, that nothing else is, and that the error is less than PyTorch's own."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch import nn

import gatedconv
from gatedconv.engine import plan_writer
from gatedconv.ops.plan import plan_isa, unavailable
from tests.engine.nets import ISAS, Residual, settle, supported
from tests.engine.test_exactness import convolutions
from tests.tolerances import assert_close, assert_no_worse, relative_error

BF16 = torch.bfloat16
X = torch.randn(2, 3, 20, 28, generator=torch.Generator().manual_seed(1))


def runs(isa: str) -> bool:
    """Whether this machine has the instructions; of those for bfloat16 alone only the library knows."""
    if isa in ISAS:
        return supported(isa)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GATEDCONV_ISA", isa)
        try:
            return unavailable() is None and plan_isa(bf16=True) == isa
        except RuntimeError:
            return False


HERE = [isa for isa in (*ISAS, "avx512_bf16", "amx") if runs(isa)]


@pytest.fixture(params=HERE)
def isa(request, monkeypatch):
    monkeypatch.setenv("GATEDCONV_ISA", request.param)
    return request.param


def engine_of(model, x=X):
    engine = gatedconv.Engine(model, x, dtype=BF16)
    assert engine.reason is None and "Nothing is left to PyTorch" in engine.describe()
    return engine


def kernels_of(engine):
    return [step.op for step in engine.plans[0].steps if step.layer is not None]


@torch.no_grad()
def rounded(conv, x):
    """A convolution in float64 whose weights and input were rounded."""
    weight = conv.weight.bfloat16().double()
    bias = None if conv.bias is None else conv.bias.double()
    return F.conv2d(
        F.pad(x.bfloat16().double(), _padding(conv)), weight, bias, conv.stride, 0, conv.dilation, conv.groups
    )


def _padding(conv):
    if conv.padding == "same":
        return conv._reversed_padding_repeated_twice
    sides = (0, 0) if conv.padding == "valid" else conv.padding
    return (sides[1], sides[1], sides[0], sides[0])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=convolutions())
def test_any_convolution_rounds_its_operands_alone(isa, case):
    conv, x = case
    engine = engine_of(nn.Sequential(conv), x)
    terms = conv.weight[0].numel()
    if conv.groups > 1:
        assert "bf16" not in kernels_of(engine)
        return
    assert kernels_of(engine) == ["bf16"]
    assert_close(engine(x), rounded(conv, x), dtype=torch.float32, terms=terms, scale=1e-3)


def test_emulations_and_dot_products_agree_bit_for_bit(monkeypatch):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, 40, 3, 2, 1), nn.ReLU(), nn.Conv2d(40, 70, 1), nn.Conv2d(70, 9, 3, 1, 2, 2))
    engine, x = engine_of(model), torch.randn(3, 3, 37, 41)
    results = {}
    for isa in HERE:
        monkeypatch.setenv("GATEDCONV_ISA", isa)
        results[isa] = engine(x)
    exact = results["portable"]
    for isa, result in results.items():
        if isa == "amx":  # adds up in another order
            assert_close(result, exact, algorithm="network", dtype=BF16)
        else:
            assert torch.equal(result, exact), isa


class Gated(nn.Module):
    """What may stand around a 1x1 convolution: a norm and an activation or a gate in front, a residual behind."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 40, 3, 2, 1)
        self.norm, self.narrow = nn.BatchNorm2d(40), nn.Conv2d(40, 24, 1)
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(24, 8, 1), nn.ReLU(), nn.Conv2d(8, 24, 1))
        self.project, self.part = nn.Conv2d(24, 24, 1), nn.Conv2d(24, 33, 3, 1, 1)
        self.last = nn.Linear(57, 10)

    def forward(self, x):
        x = self.narrow(F.silu(self.norm(F.max_pool2d(self.first(x), 2))))
        x = F.gelu(x + self.project(x * torch.sigmoid(self.squeeze(x))))
        x = torch.cat([x, self.part(x)], 1)
        return self.last(x.mean((2, 3)))


NETS = {
    "gated": Gated,
    "residual": lambda: nn.Sequential(nn.Conv2d(3, 32, 7, 2, 3), Residual(32, 48, 2), Residual(32, 20)),
    "resnet20": gatedconv.models.resnet20,
    "vgg": lambda: nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.MaxPool2d(4), nn.Conv2d(64, 32, 3), nn.Flatten(), nn.Linear(32 * 8, 12)
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_the_error_is_no_larger_than_pytorchs_own(isa, name):
    torch.manual_seed(5)
    model, x = settle(NETS[name]()), X
    engine = engine_of(model)
    assert kernels_of(engine).count("bf16") >= 2
    assert not {"conv", "winograd2", "winograd4"} & set(kernels_of(engine))
    with torch.no_grad():
        plain = copy.deepcopy(model).bfloat16()(x.bfloat16())
        exact = copy.deepcopy(model).double()(x.double())
    assert_no_worse(engine(x), plain, exact, name)
    assert relative_error(engine(x), exact) > 1e-5  # it is no float32


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "densenet121"])
def test_the_error_of_published_networks(name):
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(6)
    model, x = settle(getattr(models, name)()), torch.randn(2, 3, 96, 64)
    engine = engine_of(model, x)
    with torch.no_grad():
        plain = copy.deepcopy(model).bfloat16()(x.bfloat16())
        exact = copy.deepcopy(model).double()(x.double())
    assert_no_worse(engine(x), plain, exact, name)


@pytest.mark.parametrize("batch", [0, 1, 3, 9])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_way_to_share_a_batch(isa, batch, threads):
    torch.manual_seed(7)
    model = nn.Sequential(nn.Conv2d(3, 70, 3, 2, 1), nn.ReLU(), nn.Conv2d(70, 300, 1), nn.MaxPool2d(2), nn.Flatten())
    x = torch.randn(batch, 3, 14, 16)
    engine = gatedconv.Engine(model, torch.zeros(1, 3, 14, 16), threads=threads, dtype=BF16)
    alone = gatedconv.Engine(model, torch.zeros(1, 3, 14, 16), threads=1, dtype=BF16)
    assert engine(x).shape == model(x).shape
    for i in range(batch):
        assert torch.equal(engine(x)[i : i + 1], alone(x[i : i + 1]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3.4e38])
def test_what_is_not_finite_reaches_those_who_read_it(isa, bad):
    conv = nn.Conv2d(5, 20, 3, 2, 1)
    x = torch.randn(1, 5, 12, 14)
    engine = engine_of(nn.Sequential(conv), x)
    x[0, 2, 5, 6] = bad
    result, exact = engine(x), rounded(conv, x)
    assert torch.equal(result.isfinite(), exact.isfinite()) and torch.equal(result.isnan(), exact.isnan())
    assert 0 < int((~result.isfinite()).sum()) < result.numel()


def test_rounding_is_to_the_nearest_even(isa):
    """A convolution that copies one value: ties, their neighbors, the largest ones, and NaN."""
    conv = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(conv.weight)
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x7F7F7FFF, 0x7F7F8000, 0x7FC00001])
    values = torch.cat([bits, bits - 2**31]).to(torch.int32).view(torch.float32)
    result = engine_of(nn.Sequential(conv), torch.zeros(1, 1, 1, 8))(values.view(1, 1, 1, -1)).flatten()
    torch.testing.assert_close(result, values.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


def test_it_stays_so_when_it_is_saved(tmp_path):
    model = settle(gatedconv.models.resnet20())
    engine = engine_of(model)
    copied = pickle.loads(pickle.dumps(engine))
    gatedconv.save(engine, tmp_path / "net.safetensors")
    loaded = gatedconv.load(tmp_path / "net.safetensors")
    for other in (copied, loaded):
        assert other.products == BF16 and torch.equal(other(X), engine(X))
    assert gatedconv.Engine(model, X).products == torch.float32


def test_describe_names_the_type_and_the_instructions(isa):
    text = engine_of(nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU())).describe()
    assert f"(bf16: {plan_isa(bf16=True)})" in text and "bf16 1x1 + relu" in text
    assert plan_isa(bf16=True) == (isa if isa in ("amx", "avx512_bf16") else "emulated")
    assert plan_isa() == (isa if isa in ISAS else "avx512")


def test_a_layer_that_is_packed_wrongly_is_named(monkeypatch):
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 24, 3), nn.Conv2d(24, 5, 1)).eval()
    pack = plan_writer.pack_bf16
    monkeypatch.setattr(plan_writer, "pack_bf16", lambda weight: pack(weight * (3 if len(weight) == 24 else 1)))
    with pytest.warns(UserWarning, match="everything runs in PyTorch.* first at 2$"):
        engine = gatedconv.Engine(net, X, dtype=BF16)
    assert torch.equal(engine(X), net(X))


def test_weights_take_half_the_memory():
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 256, 1))
    half, full = (gatedconv.Engine(model, X, dtype=dtype).plans[0].steps for dtype in (BF16, None))
    assert [step.weight_bytes for step in half if step.layer][1] * 2 == full[2].weight_bytes


@pytest.mark.parametrize(
    ("dtype", "error"),
    [(torch.float16, ValueError), (torch.float64, ValueError), (torch.int8, ValueError), ("bfloat16", TypeError)],
)
def test_other_types_are_refused(dtype, error):
    with pytest.raises(error, match=r"^Engine: dtype must be .*, got [^\n]*$"):
        gatedconv.Engine(nn.Conv2d(3, 4, 1), X, dtype=dtype)


def test_a_model_in_bfloat16_keeps_its_type():
    model = nn.Conv2d(3, 4, 1).bfloat16()
    assert gatedconv.Engine(model, X.bfloat16(), dtype=BF16)(X.bfloat16()).dtype == BF16
    with pytest.raises(ValueError, match="must be torch.bfloat16 for a model in torch.bfloat16"):
        gatedconv.Engine(model, X.bfloat16(), dtype=torch.float32)
