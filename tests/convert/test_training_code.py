"""Code that does something else in training than in eval."""

from __future__ import annotations

import copy
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import gatedconv
from tests.convert.unusual import Base, Shift, block, images, residual
from tests.tolerances import assert_close


class TrainingHead(Base):
    """A head that runs in training alone, on a map that loses channels."""

    def __init__(self):
        super().__init__()
        self.extra = block(8, 8)

    def forward(self, x):
        x = self.b(self.a(x))
        y = self.fc(self.c(x).mean((2, 3)))
        return (y, self.fc(self.extra(x).mean((2, 3)))) if self.training else y


class Casting(Base):
    """A part that runs in another type."""

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def features(self, x):
        return super().features(x).float()


@pytest.mark.parametrize("kind", [TrainingHead, Casting])
@pytest.mark.parametrize("closed", [False, True])
def test_a_compact_network_trains(kind, closed):
    torch.manual_seed(0)
    x, model = images(2, 3, 12, 12), kind().eval()
    gated = gatedconv.gate_model(model, "both", example_input=x)
    gates = gatedconv.gates(gated)
    frozen = gatedconv.freeze(
        gated, masks={n: torch.arange(g.num_gates) % 3 < 2 - 2 * closed for n, g in gates.items()}
    )
    small = gatedconv.compact(frozen, x)
    with torch.no_grad():
        assert_close(small(x), frozen(x), dtype=torch.bfloat16 if kind is Casting else None)
    for out in (small.train()(x), frozen.train()(x)):
        if not closed:  # else it is a constant
            sum(t.square().mean() for t in (out if isinstance(out, tuple) else (out,))).backward()
    assert closed or all(p.grad is not None for p in small.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gates_whose_losses_a_checkpoint_keeps_away_are_named(reentrant):
    class Checkpointed(Base):
        def forward(self, x):
            return self.fc(self.c(checkpoint(self.b, self.a(x), use_reentrant=reentrant)).mean((2, 3)))

    gated = gatedconv.gate_model(Checkpointed(), "channel", example_input=images(2, 3, 12, 12))
    assert ("do not reach b.1.channel_gate, which" in gated.conversion.note) == reentrant
    gated.train()(images(2, 3, 12, 12))
    assert gatedconv.gates(gated)["b.1.channel_gate"].open_rate.requires_grad != reentrant
    expected = pytest.warns(UserWarning, match="1 of 3 gates ran without gradients") if reentrant else nullcontext()
    with expected:
        gatedconv.polarization_loss(gated).backward()


class HalfBlock(nn.Module):
    """A residual block whose second half is recomputed in backward."""

    def __init__(self, channels):
        super().__init__()
        self.first, self.second = block(channels, channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.again, self.reentrant = True, False

    def forward(self, x):
        half = self.first(x)
        end = checkpoint(self.second, half, use_reentrant=self.reentrant) if self.again else self.second(half)
        return torch.relu(x + end)


class HalfCheckpointed(nn.Module):
    """A stem and such a block."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.fc = nn.Conv2d(3, 8, 3), HalfBlock(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.block(self.stem(x)).mean((2, 3)))


def half_checkpointed():
    """Gated by layer, norms in eval; and two batches whose decisions differ."""
    gated = gatedconv.gate_model(HalfCheckpointed(), "layer", example_input=images(4, 3, 12, 12)).train()
    gated.block.first[1].eval()
    (gate,) = gatedconv.gates(gated).values()
    gate.norm.eval()
    nn.init.normal_(gate.fc2.weight)
    first, second = images(4, 3, 12, 12), -2 * images(4, 3, 12, 12)
    logits = [(gated(x), gate.logits.detach().clone())[1] for x in (first, second)]
    with torch.no_grad():
        gate.fc2.bias -= torch.cat(logits).median()
    decisions = [(gated(x), gate.logits.detach() > 0)[1] for x in (first, second)]
    assert not torch.equal(*decisions)
    return gated, first, second


def test_the_end_of_a_branch_is_recomputed_with_the_decision_of_its_own_forward():
    gated, first, second = half_checkpointed()
    plain = copy.deepcopy(gated)
    plain.block.again = False
    out = gated(first)
    with torch.no_grad():
        gated.eval()(second[:3])  # another decision before the backward
        gated.train()
        gated.block.first[1].eval()
        gatedconv.gates(gated)["block.layer_gate"].norm.eval()
    out.square().sum().backward()
    plain(first).square().sum().backward()
    for (name, mine), its in zip(gated.named_parameters(), plain.parameters(), strict=True):
        assert_close(mine.grad, its.grad, name=name)


def test_two_forwards_before_a_backward_that_recomputes_half_a_branch_are_refused():
    gated, first, second = half_checkpointed()
    both = gated(first).sum() + gated(second).sum()
    with pytest.raises(RuntimeError, match="after 2 forwards a checkpoint runs the Conv2d of a gated branch again"):
        both.backward()
    del both
    gated(first).sum()  # a graph that is gone counts no more
    gated(second).sum().backward()


def test_half_a_branch_in_a_reentrant_checkpoint_is_refused():
    network = HalfCheckpointed()
    network.block.reentrant = True
    message = "gate_model: a checkpoint with use_reentrant=True holds the end of what block.layer_gate gates"
    with pytest.raises(ValueError, match=message):
        gatedconv.gate_model(network, "layer", example_input=images(4, 3, 12, 12))


def test_a_loss_on_gates_after_a_forward_without_gradients_warns():
    model = gatedconv.models.resnet20(gate="channel").train()
    with torch.no_grad():
        model(images(2, 3, 32, 32))
        gatedconv.polarization_loss(model)  # a number for a log
    for loss in (gatedconv.polarization_loss, gatedconv.mac_target_loss, gatedconv.activation_loss):
        with pytest.warns(UserWarning, match="gates ran without gradients"):
            loss(model)


class Merging(nn.Conv2d):
    """A low-rank addition that is merged into the weight in eval, as LoRA's is."""

    def __init__(self, channels):
        super().__init__(channels, channels, 1)
        self.low, self.merged = nn.Parameter(torch.ones(channels, channels, 1, 1) / 8), False
        self.weight.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            self.weight.data += self.low.data * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x):
        return F.conv2d(x, self.weight if self.merged else self.weight + self.low, self.bias)


def merging():
    torch.manual_seed(0)
    return residual(Merging(8), nn.BatchNorm2d(8), nn.ReLU(), block(8, 8))


@pytest.mark.parametrize("training", [False, True])
def test_weights_that_are_merged_in_eval_are_unmerged_again(training, tmp_path):
    x, model = images(4, 3, 12, 12), merging().train(training)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gated = gatedconv.gate_model(model, "both", example_input=x)
    gatedconv.count_macs(gated, x)
    frozen = gatedconv.freeze(gated, [x])
    small = gatedconv.compact(frozen, x)
    gatedconv.save(small, tmp_path / "small")
    for made in (model, gated, frozen, small):
        assert made.training == training and made[1].merged != training
        for name, tensor in state.items():
            if "1." in name and "gate" not in name:
                assert_close(made.state_dict()[name], tensor)
    for mode in (False, True):
        loaded = gatedconv.load(tmp_path / "small", into=merging().train(mode))
        assert_close(loaded(x), small.eval()(x))


class Chance(nn.Module):
    """Random numbers of Python and numpy decide in training."""

    def __init__(self):
        super().__init__()
        self.a, self.b = block(8, 8), block(8, 8)

    def forward(self, x):
        if self.training and random.random() < 0.5:
            return x
        return x + self.b(self.a(x)) * (float(np.random.rand()) if self.training else 1)


def test_random_numbers_of_python_and_numpy_are_the_same_for_both():
    random.seed(1), np.random.seed(1)
    model, x = residual(*(Chance() for _ in range(4))), images(2, 3, 12, 12)
    drawn = random.getstate(), np.random.get_state()[1].tolist()
    gated = gatedconv.gate_model(model, "both", example_input=x)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == drawn
    assert len(gated.conversion.gated) == 12 and not gated.conversion.note


class Groups(Shift):
    """Eight images are one clip in training; a fourth of their batch would be another network's."""

    def features(self, x):
        if self.training:
            x = x.view(-1, 8, *x.shape[1:]).flatten(0, 1)
        return super().features(x)


def test_a_training_step_is_compared_on_as_many_images_as_the_code_takes():
    gated = gatedconv.gate_model(Groups(), "both", example_input=images(8, 3, 12, 12))
    assert gated.conversion.gated and "not checked" not in gated.conversion.note


def test_macs_of_a_network_with_a_head_of_training_alone_are_estimates():
    torch.manual_seed(0)
    model, x = TrainingHead().eval(), images(2, 3, 12, 12)
    gated = gatedconv.gate_model(model, "both", example_input=x)
    masks = {n: torch.arange(g.num_gates) % 3 != 1 for n, g in gatedconv.gates(gated).items()}
    small = gatedconv.compact(gatedconv.freeze(gated, masks=masks), x)
    promised = float(gatedconv.expected_macs(gated, {n: m.float() for n, m in masks.items()}))
    assert promised != gatedconv.count_macs(small, x[:1]) and "b.1" in gated.conversion.estimated


class Narrow(Base):
    """In training it looks at the channels of a map in a way that no smaller one allows."""

    def forward(self, x):
        x = self.b(self.a(x))
        y = self.c[0](x)
        if self.training and self.c[0].weight.shape[0] != 8:
            raise RuntimeError("eight channels are needed")
        return self.fc(self.c[2](self.c[1](y)).mean((2, 3)))


def test_a_compact_network_that_does_not_train_is_named():
    torch.manual_seed(0)
    model, x = Narrow().eval(), images(2, 3, 12, 12)
    gated = gatedconv.gate_model(model, "channel", example_input=x)
    frozen = gatedconv.freeze(gated, masks={n: torch.arange(8) > 2 for n in gatedconv.gates(gated)})
    with pytest.warns(UserWarning, match="^compact: the result runs in eval, but not in training"):
        small = gatedconv.compact(frozen, x)
    assert_close(small(x), frozen.eval()(x))
    assert small.c[1].num_features == 5  # the smallest that is right in eval


def test_every_module_keeps_its_mode():
    model, x = Base().eval(), images(2, 3, 12, 12)
    gated = gatedconv.gate_model(model, "both", example_input=x)
    frozen = gatedconv.freeze(
        gated, masks={n: torch.arange(g.num_gates) > 2 for n, g in gatedconv.gates(gated).items()}
    )
    frozen.train()
    frozen.b.eval()
    frozen.c[0].eval()
    small = gatedconv.compact(frozen, x)
    modes = {path: module.training for path, module in frozen.named_modules()}
    assert {path: m.training for path, m in small.named_modules()}.items() <= modes.items()
    assert small.training and small.a[1].training and not small.b[1].training and not small.c[0].training


class EvalOnly(nn.Conv2d):
    """It does not train on maps as small as these."""

    def forward(self, x):
        if self.training:
            raise RuntimeError("too small")
        return super().forward(x)


def test_a_layer_that_never_trained_is_sliced():
    torch.manual_seed(0)
    model = residual(EvalOnly(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), block(8, 8)).eval()
    x = images(2, 3, 12, 12)
    gated = gatedconv.gate_model(model, "channel", example_input=x)
    frozen = gatedconv.freeze(gated, masks={n: torch.arange(8) > 2 for n in gatedconv.gates(gated)})
    small = gatedconv.compact(frozen, x)
    (layer,) = (m for m in small.modules() if isinstance(m, EvalOnly))
    assert layer.weight.shape[:2] == (5, 5)
    assert_close(small(x), frozen(x))


class LowRank(Merging):
    """Its addition is a product whose factors no slice of the layer fits."""

    def __init__(self, channels):
        super().__init__(channels)
        self.low = nn.Parameter(torch.ones(channels * channels) / 8)

    def train(self, mode=True):
        self.low.data = self.low.data.view_as(self.weight)
        super().train(mode)
        self.low.data = self.low.data.flatten()
        return self

    def forward(self, x):
        return F.conv2d(x, self.weight if self.merged else self.weight + self.low.view_as(self.weight), self.bias)


@pytest.mark.parametrize("training", [False, True])
def test_a_layer_that_could_not_train_on_fewer_channels_keeps_all(training):
    torch.manual_seed(0)
    model = residual(LowRank(8), nn.BatchNorm2d(8), nn.ReLU(), block(8, 8)).train(training)
    x = images(4, 3, 12, 12)
    gated = gatedconv.gate_model(model, "channel", example_input=x)
    frozen = gatedconv.freeze(gated, masks={n: torch.arange(8) > 2 for n in gatedconv.gates(gated)})
    small = gatedconv.compact(frozen, x)
    assert small[1].in_channels == small[1].out_channels == 8 and small[0][0].out_channels == 5
    assert_close(small.eval()(x), frozen.eval()(x))
    small.train()(x)


class Dropping(Base):
    """Its dropout is on in eval, too."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def train(self, mode=True):
        super().train(mode)
        self.drop.train()
        return self

    def features(self, x):
        return self.drop(super().features(x))


def test_a_graph_would_lose_a_dropout_that_is_on_in_eval(tmp_path):
    torch.manual_seed(0)
    model, x = Dropping().eval(), images(2, 3, 12, 12)
    gated = gatedconv.gate_model(model, "channel", example_input=x)
    gatedconv.save(gated, tmp_path / "net")
    with pytest.raises(ValueError, match=r"whose forward no graph describes .*pass it as into="):
        gatedconv.load(tmp_path / "net")
    loaded = gatedconv.load(tmp_path / "net", into=model)
    outputs = []
    for net in (loaded, gated.eval()):
        torch.manual_seed(1)
        outputs.append(net(x))
    assert torch.equal(*outputs) and loaded.drop.training
