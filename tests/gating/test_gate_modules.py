"""LayerGate and ChannelGate against the layers that the paper's Table 2 lists."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import gatedconv
from gatedconv import ChannelGate, LayerGate


def table_2(gate, features):
    """Logits by the functional layers, batch statistics."""
    h = F.linear(features, gate.fc1.weight, gate.fc1.bias)
    h = (h - h.mean(0)) / (h.var(0, unbiased=False) + gate.norm.eps).sqrt() * gate.norm.weight + gate.norm.bias
    return F.linear(F.relu(h), gate.fc2.weight, gate.fc2.bias)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layer_gate(layout):
    torch.manual_seed(0)
    gate, x = LayerGate(5), torch.randn(8, 5, 6, 7).contiguous(memory_format=layout)
    torch.nn.init.normal_(gate.fc2.weight)
    out = gate(x)
    logits = table_2(gate, x.mean(dim=(2, 3)))
    torch.testing.assert_close(gate.logits, logits)
    assert torch.equal(out, (logits > 0).float()) and out.shape == (8, 1)
    assert 0 < out.mean() < 1
    assert torch.equal(gate.open_rate, out.mean(0))
    assert torch.allclose(gate.running_open_rate, 0.9 + 0.1 * out.mean(0))


def test_channel_gate_pooled_and_flattened_with_one_and_two_layers():
    torch.manual_seed(0)
    x = torch.randn(8, 5, 4, 3)
    for pool, features in (("avg", x.mean(dim=(2, 3))), ("flatten", x.flatten(1))):
        two = ChannelGate(5, 7, pool=pool, feature_size=12)
        assert two(x).shape == (8, 7)
        torch.testing.assert_close(two.logits, table_2(two, features))
        one = ChannelGate(5, hidden=None, pool=pool, feature_size=(4, 3))
        assert one(x).shape == (8, 5) and one.fc1 is None and one.norm is None
        torch.testing.assert_close(one.logits, F.linear(features, one.fc2.weight, one.fc2.bias))


@pytest.mark.parametrize("estimator", ["ste", "gumbel", "bernoulli", "batch_mean"])
def test_gradients_reach_every_parameter_and_the_input(estimator):
    torch.manual_seed(0)
    gate, x = ChannelGate(4, estimator=estimator), torch.randn(16, 4, 5, 5, requires_grad=True)
    (gate(x) * torch.randn(16, 4)).sum().backward()
    for name, parameter in gate.named_parameters():
        assert parameter.grad is not None, name
        if name != "fc1.bias":  # the norm removes a bias before it: its gradient is rounding noise
            assert parameter.grad.abs().sum() > 0, name
    assert x.grad.abs().sum() > 0


def test_half_input_decides_in_float32():
    gate = LayerGate(3).eval()
    x = torch.randn(4, 3, 8, 8, dtype=torch.bfloat16)
    out = gate(x)
    assert out.dtype == torch.bfloat16 and gate.logits.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gate(x)
    assert gate.logits.dtype == torch.float32


def test_gates_start_open_and_inside_the_window():
    for seed in range(5):
        torch.manual_seed(seed)
        gate = ChannelGate(64)
        gate(torch.randn(128, 64, 4, 4))
        assert gate.open_rate.min() == 1 and not gate.saturated.any() and not gate.dead.any()


def test_dead_and_saturated_are_distinguished():
    gate = ChannelGate(3, hidden=None).eval()
    torch.nn.init.zeros_(gate.fc2.weight)
    gate.fc2.bias.data = torch.tensor([-2.0, 0.5, 2.0])
    gate(torch.randn(4, 3, 2, 2))
    assert gate.saturated.tolist() == [True, False, True] and gate.dead.tolist() == [True, False, False]


def test_only_estimators_with_a_window_saturate():
    x = torch.randn(8, 3, 2, 2)
    for estimator, logits, saturated in (
        ("gumbel", -5.0, False),
        ("bernoulli", -5.0, False),
        ("batch_mean", -5.0, False),  # at its own threshold, wherever that is
        ("ste", -5.0, True),
    ):
        gate = ChannelGate(3, hidden=None, estimator=estimator)
        torch.nn.init.zeros_(gate.fc2.weight)
        torch.nn.init.constant_(gate.fc2.bias, logits)
        out = gate(x)
        assert gate.saturated.tolist() == gate.dead.tolist() == [saturated] * 3
        (grad,) = torch.autograd.grad(out.sum(), gate.fc2.bias)
        assert bool((grad == 0).all()) == saturated or estimator == "batch_mean"
    frozen = gatedconv.freeze(torch.nn.Sequential(ChannelGateUser()), masks={"0.gate": torch.ones(3).bool()})
    assert not gatedconv.gates(frozen)["0.gate"].saturated.any()


class ChannelGateUser(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = ChannelGate(3)

    def forward(self, x):
        return x * self.gate(x)[:, :, None, None]


def test_a_used_gate_copies_and_pickles():
    gate = LayerGate(3)
    gate(torch.randn(4, 3, 2, 2))
    assert gate.open_rate.requires_grad
    for other in (copy.deepcopy(gate), pickle.loads(pickle.dumps(gate))):
        assert other.open_rate is None and other.logits is None
        assert all(
            torch.equal(a, b) for a, b in zip(gate.state_dict().values(), other.state_dict().values(), strict=True)
        )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ChannelGate(4, 0), "num_gates must be at least 1, got 0"),
        (lambda: ChannelGate(4, hidden=0), "hidden must be a positive int or None"),
        (lambda: ChannelGate(4, pool="max"), "pool must be one of avg, flatten"),
        (lambda: ChannelGate(4, pool="flatten"), "needs feature_size"),
        (lambda: LayerGate(4)(torch.randn(4, 4)), r"input must be \(N, C, H, W\)"),
        (lambda: ChannelGate(2, pool="flatten", feature_size=9)(torch.randn(2, 2, 2, 2)), r"built for H\*W = 9"),
    ],
)
def test_bad_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_gates_are_found_in_module_order_before_any_forward():
    model = gatedconv.models.resnet20(gate="both")
    names = list(gatedconv.gates(model))
    assert names[:3] == ["layer1.0.layer_gate", "layer1.0.channel_gate", "layer1.1.layer_gate"]
    assert len(names) == 18 and gatedconv.gates(gatedconv.models.resnet20()) == {}
    assert list(gatedconv.gates(torch.nn.DataParallel(model))) == names
    assert list(gatedconv.gates(torch.compile(model))) == names
    with pytest.raises(TypeError, match="torch.nn.Module"):
        gatedconv.gates("resnet20")


@pytest.mark.parametrize("gate", [LayerGate(3), ChannelGate(3), ChannelGate(3, hidden=None)])
def test_a_training_batch_of_one_uses_the_running_statistics(gate):
    torch.manual_seed(0)
    for _ in range(3):
        gate(torch.randn(8, 3, 4, 4) + 1)
    before = {name: buffer.clone() for name, buffer in gate.named_buffers() if name.startswith("norm")}
    x = torch.randn(1, 3, 4, 4)
    gate(x)
    logits, copied = gate.logits, copy.deepcopy(gate).eval()
    copied(x)
    torch.testing.assert_close(logits, copied.logits)
    for name, buffer in before.items():
        assert torch.equal(buffer, dict(gate.named_buffers())[name])
    gate.open_rate.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in gate.parameters())


@pytest.mark.parametrize("estimator", gatedconv.ops.ESTIMATORS)
@pytest.mark.parametrize("hidden", [16, None])
def test_a_training_batch_of_no_samples_changes_nothing(hidden, estimator):
    gate = ChannelGate(3, hidden=hidden, estimator=estimator)
    before = copy.deepcopy(gate.state_dict())
    (gate(torch.randn(0, 3, 4, 4)).sum() + gate.open_rate.sum()).backward()
    assert torch.equal(gate.open_rate, torch.zeros(3))
    assert all(torch.equal(value, before[name]) for name, value in gate.state_dict().items())
    assert all(p.grad is None or p.grad.isfinite().all() for p in gate.parameters())


def test_a_gated_network_trains_on_a_batch_of_one():
    model = gatedconv.models.ResNet(8, 3, "both", input_size=(1, 8, 8)).train()
    loss = model(torch.randn(1, 1, 8, 8)).square().mean() + gatedconv.polarization_loss(model)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
