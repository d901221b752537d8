"""gate_model: where gates go, what it leaves alone, and that it changes nothing at first."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gatedconv
from gatedconv.convert.install import computing_all_samples
from gatedconv.convert.verify import distance
from tests.convert.networks import IMAGES, NETWORKS, Plain, Residual, network
from tests.tolerances import assert_close, near


def gated(name, gate="both", **options):
    return gatedconv.gate_model(network(name), gate, example_input=IMAGES, **options)


@pytest.mark.parametrize("name", NETWORKS)
def test_gates_start_open_and_weights_keep_their_names(name):
    model = network(name)
    result = gatedconv.gate_model(model, "channel", example_input=IMAGES)
    assert torch.equal(result(IMAGES), model(IMAGES))
    names = {n for n in result.state_dict() if "_gate" not in n}
    assert names == set(model.state_dict())
    assert all(result.get_parameter(n) is not p for n, p in model.named_parameters())
    assert not result.training and set(result.conversion.gated) == set(gatedconv.gates(result))


def test_layer_gates_are_found_from_the_additions():
    result = gated("residual", "layer")
    assert list(gatedconv.gates(result)) == [f"blocks.{i}.layer_gate" for i in range(3)]
    assert result.conversion.reachable_macs > 0.8


def test_channel_gates_follow_the_norm_and_spare_shortcuts_and_squeeze_excite():
    result = gated("residual", "channel")
    expected = [f"blocks.{i}.bn{j}.channel_gate" for i in range(3) for j in (1, 2, 3)]
    assert sorted(gatedconv.gates(result)) == sorted(expected)
    skipped = result.conversion.skipped
    assert "pooled" in skipped["blocks.0.squeeze"] and "shortcut" in skipped["blocks.1.project.0"]
    assert "identity shortcuts" in skipped["stem"]
    assert skipped["fc"] == "a dense layer"


def test_a_depthwise_convolution_shares_the_gate_of_its_input():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.BatchNorm2d(8),
        nn.Sigmoid(),
        nn.Conv2d(8, 4, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    ).eval()
    result = gatedconv.gate_model(model, "channel", example_input=IMAGES)
    assert sorted(gatedconv.gates(result)) == ["1.channel_gate", "6.channel_gate"]
    assert "depthwise" in result.conversion.skipped["3"]


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        ("middle", [f"blocks.{i}.conv2.channel_gate" for i in range(3)]),
        ("before", ["blocks.0.conv1.channel_gate", "blocks.1.conv1.channel_gate", "blocks.2.conv1.channel_gate"]),
    ],
)
def test_positions(position, expected):
    model = network("residual")
    result = gatedconv.gate_model(model, "channel", position=position, example_input=IMAGES)
    assert sorted(gatedconv.gates(result)) == expected
    assert torch.equal(result(IMAGES), model(IMAGES))


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"include": "blocks.1"}, {"blocks.1.layer_gate", *(f"blocks.1.bn{i}.channel_gate" for i in (1, 2, 3))}),
        ({"include": ["blocks.*.conv1"]}, {f"blocks.{i}.bn1.channel_gate" for i in range(3)}),
        (
            {"exclude": lambda name, module: "blocks" in name and not name.endswith("conv2")},
            {f"blocks.{i}.bn2.channel_gate" for i in range(3)},
        ),
        (
            {"include": "blocks", "exclude": ["blocks.0", "blocks.1"]},
            {"blocks.2.layer_gate", *(f"blocks.2.bn{i}.channel_gate" for i in (1, 2, 3))},
        ),
    ],
)
def test_include_and_exclude(choice, expected):
    result = gated("residual", "both", **choice)
    assert set(gatedconv.gates(result)) == expected


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match="match nothing: .*nowhere"):
        gated("residual", include=["blocks.1", "nowhere"])


class Odd(nn.Module):
    """Repeated, frozen, tied and transposed convolutions."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.repeated = nn.Conv2d(6, 6, 3, padding=1)
        self.frozen = nn.Conv2d(6, 6, 1).requires_grad_(False)
        self.tied = nn.Conv2d(6, 6, 1)
        self.also_tied = nn.Conv2d(6, 6, 1)
        self.also_tied.weight = self.tied.weight
        self.up = nn.ConvTranspose2d(6, 6, 2, 2, groups=2)
        self.last = nn.Conv2d(6, 5, 1)

    def forward(self, x):
        x = self.repeated(F.relu(self.repeated(F.relu(self.first(x)))))
        x = self.up(self.also_tied(F.relu(self.tied(self.frozen(x)))))
        return self.last(F.relu(x)).mean((2, 3))


def test_what_is_left_alone_has_a_reason():
    model = Odd().eval()
    result = gatedconv.gate_model(model, "channel", example_input=IMAGES)
    assert list(gatedconv.gates(result)) == ["first.channel_gate", "repeated.channel_gate"]
    reasons = result.conversion.skipped
    assert "frozen" in reasons["frozen"]
    assert "shared with another" in reasons["tied"] and "transposed" in reasons["up"]
    assert "the model's outputs" in reasons["last"]
    assert torch.equal(result(IMAGES), model(IMAGES))
    assert "first.channel_gate" in str(result.conversion) and "transposed" in str(result.conversion)


class DataDependent(nn.Module):
    """Control flow that no tracer can follow."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.head = nn.Conv2d(6, 5, 1)

    def forward(self, x):
        x = F.relu(self.conv(x))
        while float(x.abs().max()) > 1:
            x = x / 2
        return self.head(x).mean((2, 3))


def test_a_model_whose_control_flow_depends_on_data_keeps_it():
    model = DataDependent().eval()
    result = gatedconv.gate_model(model, "channel", example_input=IMAGES)
    assert torch.equal(result(IMAGES), model(IMAGES)) and torch.equal(result(9 * IMAGES), model(9 * IMAGES))
    masks = {n: torch.arange(g.num_gates) % 2 == 0 for n, g in gatedconv.gates(result).items()}
    frozen = gatedconv.freeze(result, masks=masks)
    small = gatedconv.compact(frozen, IMAGES)
    assert type(small) is DataDependent and small.conv.out_channels == 3
    with torch.no_grad():
        assert_close(small(9 * IMAGES), frozen(9 * IMAGES))


@pytest.mark.parametrize("estimator", ["ste", "gumbel", "bernoulli", "batch_mean"])
def test_two_steps_of_training_reach_every_gate(estimator):
    model = gated("residual", estimator=estimator).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    images = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(3))
    for _ in range(2):
        loss = model(images).square().mean() + gatedconv.mac_target_loss(model) + gatedconv.polarization_loss(model)
        optimizer.zero_grad()
        loss.backward()
        assert torch.isfinite(loss)
        for name, gate in gatedconv.gates(model).items():
            assert all(torch.isfinite(p.grad).all() for p in gate.parameters()), name
            # Compared with its mean, a logit does not feel the bias.
            learner = gate.fc2.weight if estimator == "batch_mean" else gate.fc2.bias
            assert learner.grad.abs().sum() > 0, name
        optimizer.step()


def test_in_eval_a_branch_runs_on_the_samples_that_are_open():
    model = gated("residual", "layer")
    first = gatedconv.gates(model)["blocks.0.layer_gate"]
    with torch.no_grad():  # open where the first feature is above its mean
        feature = F.relu(model.stem(IMAGES)).mean((2, 3))
        for layer in (first.fc1, first.fc2):
            nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
        column = int((feature[0] - feature[1]).argmax())
        first.fc1.weight[0, column] = 1
        first.norm.running_mean[0] = feature[:, column].mean()
        first.fc2.weight[0, 0] = 1
        first.fc2.bias[0] = -1e-6
    seen = []
    model.blocks.get_submodule("0").conv2.register_forward_hook(lambda m, a, o: seen.append(o.shape[0]))
    with torch.no_grad():
        skipped = model(IMAGES)
        with computing_all_samples():
            assert_close(model(IMAGES), skipped)
    assert seen == [1, 2]


def test_expected_macs_are_those_of_the_dense_model_while_open():
    for name in NETWORKS:
        model = network(name)
        result = gatedconv.gate_model(
            model, "both" if name in ("residual", "grouped") else "channel", example_input=IMAGES
        )
        total = gatedconv.count_macs(model, IMAGES[:1])
        assert sum(t.macs for t in result.mac_terms) == near(total, torch.float64)
        rates = {n: torch.ones(g.num_gates, dtype=torch.float64) for n, g in gatedconv.gates(result).items()}
        assert float(gatedconv.expected_macs(result, rates)) == near(total, torch.float64)


def test_copies_and_pickles_keep_everything():
    model = gated("residual")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(gatedconv.gates(other)) == list(gatedconv.gates(model))
        assert other.mac_terms == model.mac_terms and other.conversion.gated == model.conversion.gated
        assert torch.equal(other(IMAGES), model(IMAGES))


def test_the_training_mode_is_kept_and_the_model_left_alone():
    model = Residual().train()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    result = gatedconv.gate_model(model, example_input=IMAGES)
    assert result.training and model.training and all(m.training for m in model.modules())
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert not hasattr(model, "conversion")


def test_stochastic_depth_and_dropout_still_work():
    pytest.importorskip("torchvision")

    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)
            self.branch = nn.Conv2d(8, 8, 1)
            import torchvision

            self.drop = torchvision.ops.StochasticDepth(0.5, "row")
            self.fc = nn.Linear(8, 5)

        def forward(self, x):
            x = self.conv(x)
            x = x + self.drop(self.branch(x))
            return self.fc(F.dropout(x.mean((2, 3)), 0.5, self.training))

    model = gatedconv.gate_model(Dropping().eval(), "layer", example_input=IMAGES)
    assert torch.equal(model(IMAGES), model(IMAGES))
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(model(IMAGES), model(IMAGES))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"gate": "block"}, ValueError, "gate must be one of"),
        ({"position": "end"}, ValueError, "position must be one of"),
        ({"estimator": "sigmoid"}, ValueError, "estimator must be one of"),
        ({"example_input": torch.zeros(3, 12, 12)}, TypeError, "example_input must be"),
        ({"example_input": None}, TypeError, "example_input must be"),
        ({"model": "resnet18"}, TypeError, "model must be"),
        ({"include": 3}, TypeError, "include must be a name"),
        ({"include": ["x", 3]}, TypeError, "include must be a name"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(432, 5))}, ValueError, "no place for a 'layer' gate"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        gatedconv.gate_model(**{"model": Plain(), "example_input": IMAGES, **arguments})


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.complex64])
def test_outputs_of_any_type_have_a_distance(dtype):
    wanted = torch.tensor([1, 1, 0]).to(dtype)
    got = torch.tensor([1, 0, 0]).to(dtype)
    assert distance((got,), [wanted]) == 1.0 and distance(wanted, wanted) == 0.0


def test_distance_of_outputs() -> None:
    assert distance(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 4.0])) == 0.25
    assert distance(torch.zeros(2), torch.zeros(2)) == 0
    assert distance(torch.zeros(0, 3), torch.zeros(0, 3)) == 0
    assert math.isinf(distance(torch.zeros(2), torch.zeros(3)))
    assert math.isinf(distance(torch.tensor(float("nan")), torch.tensor(1.0)))
    assert distance(torch.tensor([math.nan, 2.0]), torch.tensor([math.nan, 2.0])) == 0
