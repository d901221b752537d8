"""freeze: votes, masks by hand, agreement, and what it refuses."""

from __future__ import annotations

import pytest
import torch

import gatedconv


def tiny(gate="channel", **options):
    torch.manual_seed(0)
    return gatedconv.models.resnet20(gate=gate, input_size=(3, 8, 8), **options).eval()


def make_gate_follow_brightness(gate):
    """Logit = mean of the input's channel 0 minus 0.5: the sample decides."""
    torch.nn.init.zeros_(gate.fc1.weight)
    torch.nn.init.zeros_(gate.fc1.bias)
    gate.fc1.weight.data[0, 0] = 1
    torch.nn.init.zeros_(gate.fc2.weight)
    gate.fc2.weight.data[:, 0] = 1
    gate.fc2.bias.data[:] = -0.5


class FirstGate(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = gatedconv.LayerGate(1)
        make_gate_follow_brightness(self.gate)

    def forward(self, x):
        return x * self.gate(x)[:, :, None, None]


def images(*levels):
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)


@pytest.mark.parametrize(
    ("levels", "is_open", "agreement"),
    [((1.0, 1.0, 0.0), True, 2 / 3), ((1.0, 0.0, 0.0), False, 2 / 3), ((1.0, 0.0), True, 0.5), ((0.0,), False, 1.0)],
)
@pytest.mark.filterwarnings("ignore:freeze")
def test_the_majority_of_all_samples_decides_and_a_tie_opens(levels, is_open, agreement):
    loader = [(images(level), None) for level in levels]  # one sample a batch
    for batches in (loader, [images(*levels)]):
        frozen = gatedconv.freeze(FirstGate().eval(), batches)
        assert frozen.consensus.masks["gate"].tolist() == [is_open]
        assert frozen.consensus.agreement == pytest.approx(agreement)
        assert frozen.consensus.open_rates["gate"].item() == pytest.approx(sum(levels) / len(levels))


def test_low_agreement_warns_and_names_the_gates():
    with pytest.warns(UserWarning, match=r"66.67% of the decisions; least on: gate 66.7%") as caught:
        gatedconv.freeze(FirstGate().eval(), [images(1.0, 1.0, 0.0)])
    assert [warning.filename for warning in caught] == [__file__]


def test_freezing_leaves_the_original_alone():
    model = tiny().train()
    model(torch.randn(4, 3, 8, 8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frozen = gatedconv.freeze(model, [torch.randn(4, 3, 8, 8)])
    assert model.training and all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert all(gate.mask is None for gate in gatedconv.gates(model).values())
    assert all(gate.mask.dtype == torch.bool for gate in gatedconv.gates(frozen).values())
    assert not any("fc1" in name for name in frozen.state_dict())


def test_without_a_loader_the_running_open_rates_of_training_decide():
    model = tiny()
    gate = gatedconv.gates(model)["layer1.0.channel_gate"]
    gate.running_open_rate.copy_(torch.linspace(0, 1, 16))
    with pytest.warns(UserWarning, match="layer1.0.channel_gate"):
        frozen = gatedconv.freeze(model)
    assert torch.equal(frozen.consensus.masks["layer1.0.channel_gate"], torch.linspace(0, 1, 16) >= 0.5)
    assert 0.9 < frozen.consensus.agreement < 1


def test_masks_by_hand_with_a_loader_measure_agreement():
    masks = {"gate": torch.tensor([False])}
    assert gatedconv.freeze(FirstGate().eval(), masks=masks).consensus.agreement is None
    with pytest.warns(UserWarning):
        frozen = gatedconv.freeze(FirstGate().eval(), [images(1.0, 1.0, 0.0)], masks=masks)
    assert frozen.consensus.masks["gate"].tolist() == [False]
    assert frozen.consensus.agreement == pytest.approx(1 / 3)


def test_training_continues_after_freezing_with_gradients_for_open_channels_only():
    model = tiny(position="middle")
    masks = {name: torch.arange(g.num_gates) % 2 == 0 for name, g in gatedconv.gates(model).items()}
    frozen = gatedconv.freeze(model, masks=masks).train()
    frozen(torch.randn(4, 3, 8, 8)).square().sum().backward()
    block = frozen.layer2[1]
    open_rows = block.conv1.weight.grad.flatten(1).abs().sum(dim=1) > 0
    assert torch.equal(open_rows, masks["layer2.1.channel_gate"])
    assert torch.equal(block.conv2.weight.grad.transpose(0, 1).flatten(1).abs().sum(dim=1) > 0, open_rows)


def test_state_dict_of_a_frozen_model_moves_the_masks():
    model = tiny("layer")
    names = list(gatedconv.gates(model))
    closed = {name: torch.tensor([False]) for name in names}
    source = gatedconv.freeze(model, masks=closed)
    target = gatedconv.freeze(model, masks={name: torch.tensor([True]) for name in names})
    target.load_state_dict(source.state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(target(x), source(x))
    assert not any(gate.is_open for gate in gatedconv.gates(target).values())


def test_bad_arguments_are_named():
    model = tiny("layer")
    good = {name: torch.tensor([True]) for name in gatedconv.gates(model)}
    first = next(iter(good))
    with pytest.raises(ValueError, match=f"missing .*{first}"):
        gatedconv.freeze(model, masks={k: v for k, v in good.items() if k != first})
    with pytest.raises(ValueError, match="unknown .'layer9'"):
        gatedconv.freeze(model, masks={**good, "layer9": torch.tensor([True])})
    with pytest.raises(TypeError, match="must be a bool tensor, got torch.float32"):
        gatedconv.freeze(model, masks={**good, first: torch.ones(1)})
    with pytest.raises(TypeError, match="must be a bool tensor, got list"):
        gatedconv.freeze(model, masks={**good, first: [True]})
    with pytest.raises(ValueError, match=r"must have shape \(1,\), got \(2,\)"):
        gatedconv.freeze(model, masks={**good, first: torch.tensor([True, True])})
    with pytest.raises(TypeError, match="masks must be a dict"):
        gatedconv.freeze(model, masks=[torch.tensor([True])])
    with pytest.raises(ValueError, match="no gates"):
        gatedconv.freeze(gatedconv.models.resnet20())
    with pytest.raises(ValueError, match="frozen already"):
        gatedconv.freeze(gatedconv.freeze(model, masks=good))
    with pytest.raises(ValueError, match="no samples"):
        gatedconv.freeze(model, [])
    with pytest.raises(TypeError, match="must yield tensors"):
        gatedconv.freeze(model, [{"image": torch.zeros(1)}])


def test_a_gate_held_twice_is_frozen_twice():
    gate = gatedconv.ChannelGate(3)
    net = torch.nn.Sequential(gatedconv.Conv2d(3, 3, 1, gate=gate), gatedconv.Conv2d(3, 3, 1, gate=gate)).eval()
    frozen = gatedconv.freeze(net, masks={"0.gate": torch.tensor([True, False, True])})
    assert frozen[0].gate is frozen[1].gate and frozen[1].gate.mask is not None
    with pytest.raises(ValueError, match="a model that contains gates"):
        gatedconv.freeze(gate)


def test_agreement_counts_only_decisions_that_were_made():
    model = tiny("both")
    for name, gate in gatedconv.gates(model).items():
        torch.nn.init.zeros_(gate.fc2.weight)
        torch.nn.init.constant_(gate.fc2.bias, -1 if name.endswith("layer_gate") else 1)
        gate.running_open_rate.fill_(0.6)
    frozen = gatedconv.freeze(model, [torch.randn(4, 3, 8, 8)])  # no warning: nobody asked the channels
    assert frozen.consensus.agreement == 1.0
    assert all(name.endswith("layer_gate") for name in frozen.consensus.gate_agreement)


def test_gates_that_are_not_numbers_are_refused():
    model = tiny("layer")
    gatedconv.gates(model)["layer2.0.layer_gate"].fc2.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="'layer2.0.layer_gate' has logits or open rates that are not finite"):
        gatedconv.freeze(model, [torch.randn(4, 3, 8, 8)])


@pytest.mark.filterwarnings("ignore:freeze")
def test_a_vote_is_counted_exactly_whatever_the_default_dtype_is():
    """Of 4,097 samples 2,048 open the gate: 0.49988, which float16 rounds to 0.5."""
    levels = [1.0] * 2048 + [0.0] * 2049
    torch.set_default_dtype(torch.float16)
    try:
        model = FirstGate().float().eval()
        frozen = gatedconv.freeze(model, [images(*levels).float()])
    finally:
        torch.set_default_dtype(torch.float32)
    assert not bool(frozen.consensus.masks["gate"].any())


class TwoInputs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = FirstGate(), torch.nn.BatchNorm2d(1)

    def forward(self, x, shift):
        return self.norm(x + shift) * self.first.gate(x)[..., None, None]


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_networks_of_several_inputs_vote_and_re_estimate(form):
    bright, shift = torch.ones(3, 1, 4, 4), torch.full((3, 1, 1, 1), 2.0)
    given = (bright, shift) if form == "tuple" else {"x": bright, "shift": shift}
    frozen = gatedconv.freeze(TwoInputs().eval(), [(given, torch.zeros(3))])
    assert frozen.consensus.open_rates["first.gate"].item() == 1
    gatedconv.re_estimate_batchnorm(frozen, [(given, torch.zeros(3))])
    assert frozen.norm.running_mean.item() == 3
    with pytest.raises(TypeError, match=r"re_estimate_batchnorm: the loader must yield tensors or \(tensor, ...\)"):
        gatedconv.re_estimate_batchnorm(frozen, ["images"])


def test_statistics_that_are_no_numbers_are_refused_and_those_of_before_kept():
    frozen = gatedconv.freeze(TwoInputs().eval(), masks={"first.gate": torch.tensor([True])})
    images, shift = torch.full((3, 1, 4, 4), torch.nan), torch.zeros(3, 1, 1, 1)
    with pytest.raises(ValueError, match="statistics of these batches are not finite"):
        gatedconv.re_estimate_batchnorm(frozen, [((images, shift), None)])
    assert frozen.norm.running_mean.item() == 0 and frozen.norm.running_var.item() == 1


@pytest.mark.parametrize("loader", [torch.zeros(4, 3, 8, 8), 3])
def test_what_is_no_loader_is_refused(loader):
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(TypeError, match="freeze: expected a loader, an iterable of batches, got "):
        gatedconv.freeze(model, loader)
    with pytest.raises(TypeError, match="re_estimate_batchnorm: expected a loader"):
        gatedconv.re_estimate_batchnorm(model, loader)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_norms_that_no_batch_reaches_keep_their_statistics():
    class Domains(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = torch.nn.ModuleList(torch.nn.BatchNorm2d(1) for _ in range(2))

        def forward(self, x, domain=0):
            return self.norms[domain](x)

    model = Domains()
    model(torch.randn(8, 1, 4, 4) + 3, domain=1)
    before = {name: tensor.clone() for name, tensor in model.norms[1].state_dict().items()}
    gatedconv.re_estimate_batchnorm(model, [images(2.0, 4.0)])
    assert model.norms[0].running_mean.item() == 3
    assert all(torch.equal(before[name], tensor) for name, tensor in model.norms[1].state_dict().items())


def test_compiled_networks_vote_as_in_eager_mode():
    x = torch.randn(16, 3, 8, 8)
    model = gatedconv.gate_model(tiny(gate=None), "both", example_input=x)
    for gate in gatedconv.gates(model).values():
        torch.nn.init.normal_(gate.fc2.weight)
        torch.nn.init.normal_(gate.fc2.bias, std=0.3)
    eager = gatedconv.freeze(model, [x]).consensus
    wrapper = torch.compile(model, backend="eager")
    assert 0 < eager.agreement < 1 and gatedconv.freeze(wrapper, [x]).consensus.agreement == eager.agreement
    model.compile(backend="eager")
    assert gatedconv.freeze(model, [x]).consensus.agreement == eager.agreement


def test_an_average_of_weights_is_frozen_by_the_masks_of_its_network():
    model = tiny()
    masks = gatedconv.freeze(model).consensus.masks
    average = torch.optim.swa_utils.AveragedModel(model)
    assert gatedconv.freeze(average, masks=masks).consensus.masks.keys() == masks.keys()
