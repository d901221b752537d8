"""Networks with a state, outputs, inputs or names of their own: a result follows them, or is refused in one line."""

from __future__ import annotations

import copy
import types
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gatedconv
from tests.convert.unusual import block, images
from tests.tolerances import assert_close


class Net(nn.Module):
    """Two blocks and scores; ``kernel`` of the second block."""

    def __init__(self, kernel: int = 3):
        super().__init__()
        self.a, self.out = block(3, 12), nn.Conv2d(12, 4, 1)
        self.b = nn.Sequential(nn.Conv2d(12, 12, kernel, padding=kernel // 2), nn.BatchNorm2d(12), nn.ReLU())

    def forward(self, x):
        return self.out(self.b(self.a(x)))


def frozen_and_compact(model, example):
    gated = gatedconv.gate_model(model.eval(), "channel", example_input=example)
    masks = {name: torch.arange(gate.num_gates) % 3 != 1 for name, gate in gatedconv.gates(gated).items()}
    frozen = gatedconv.freeze(gated, masks=masks).eval()
    return frozen, gatedconv.compact(frozen, example).eval()


@dataclass(slots=True)
class Scores:
    logits: torch.Tensor


@pytest.mark.parametrize("kind", ["slots", "view", "cycle"])
def test_outputs_are_found_in_objects_of_any_kind(kind):
    class Wrapped(Net):
        def forward(self, x):
            scores = super().forward(x)
            if kind == "slots":
                return Scores(scores)
            if kind == "view":
                return {"scores": scores}.values()
            itself = types.SimpleNamespace(logits=scores)
            itself.me = itself
            return itself

    def scores_of(output):
        return next(iter(output)) if kind == "view" else output.logits

    frozen, small = frozen_and_compact(Wrapped(), images(2, 3, 16, 16))
    assert "out.channel_gate" not in gatedconv.gates(frozen)  # scores are never gated
    assert_close(scores_of(small(images(3, 3, 16, 16))), scores_of(frozen(images(3, 3, 16, 16))), algorithm="network")
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in frozen.parameters())


@pytest.mark.parametrize("kind", ["generator", "array"])
def test_outputs_that_cannot_be_followed_are_refused(kind):
    class Wrapped(Net):
        def forward(self, x):
            scores = super().forward(x)
            return (s for s in [scores]) if kind == "generator" else scores.detach().numpy()

    with pytest.raises(ValueError, match="gate_model: .*(returns a generator|returns a ndarray without any)"):
        gatedconv.gate_model(Wrapped().eval(), "channel", example_input=images(2, 3, 16, 16))


@pytest.mark.parametrize("in_place", [True, False])
def test_a_state_that_changes_in_eval_changes_in_no_network_that_is_only_checked(in_place):
    class Counting(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(12))
            self.seen = []

        def forward(self, x):
            h = self.b(self.a(x))
            self.seen.append(len(x))
            if in_place:
                self.mean.mul_(0.9).add_(h.detach().mean((0, 2, 3)), alpha=0.1)
            else:
                self.mean = 0.9 * self.mean + 0.1 * h.detach().mean((0, 2, 3))
            return self.out(h - self.mean.view(1, -1, 1, 1))

    model = Counting()
    frozen, small = frozen_and_compact(model, images(2, 3, 16, 16))
    for network in (model, frozen, small):
        assert not network.mean.any() and network.seen == []
    assert_close(small(images(3, 3, 16, 16)), frozen(images(3, 3, 16, 16)), algorithm="network")


@pytest.mark.parametrize("training", [True, False])
def test_a_function_that_holds_layers_is_refused_and_nothing_has_changed(training):
    class Held(Net):
        def __init__(self):
            super().__init__()
            layers = self.b
            self.second = lambda x: layers(x)

        def forward(self, x):
            return self.out(self.second(self.a(x)))

    model = Held().train(training)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"gate_model: Held keeps a function .* which a copy shares \(b\.0\.weight\)"):
        gatedconv.gate_model(model, "channel", example_input=images(2, 3, 16, 16))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("ran", [True, False])
def test_a_hook_that_holds_the_model_is_named(ran):
    class Hooked(Net):
        def __init__(self):
            super().__init__()
            self.features = {}
            self.a.register_forward_hook(lambda module, args, output: self.features.update(a=output))

        def forward(self, x):
            self.a(x)
            return self.out(self.b(self.features["a"]))

    model = Hooked().eval()
    if ran:
        model(images(2, 3, 16, 16))
    with pytest.raises(ValueError, match="a hook of a is a function that holds the model"):
        gatedconv.gate_model(model, "channel", example_input=images(2, 3, 16, 16))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_scripted_layers_train_in_the_copy_alone():
    class Scripted(Net):
        def __init__(self):
            super().__init__()
            self.scripted = torch.jit.script(nn.Conv2d(12, 12, 1))

        def forward(self, x):
            return self.out(self.b(self.scripted(self.a(x))))

    model = Scripted()
    gated = gatedconv.gate_model(model, "channel", example_input=images(2, 3, 16, 16))
    torch.optim.SGD(gated.parameters(), lr=0.1)
    gated.train()(images(2, 3, 16, 16)).square().mean().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in gated.scripted.parameters())


class Rare(Net):
    """An addition that happens for bright images alone."""

    def __init__(self):
        super().__init__(kernel=1)

    def forward(self, x):
        h = self.a(x)
        return self.out(self.b(h + 1 if h.amax() > 20 else h))


class Single(Net):
    """For one image: adds or subtracts, by its values."""

    def __init__(self):
        super().__init__(kernel=1)
        self.fc = nn.Linear(12 * 256, 4)

    def forward(self, x):
        h = self.a(x)
        return self.fc(self.b(h + 1 if h.abs().mean() > 0.8 else h - 1).view(1, -1))


class Range(Net):
    """Scales by its own numbers."""

    def forward(self, x):
        low, high = x.min().item(), x.max().item()
        return super().forward((x - low) / (high - low))


class Wide(Net):
    """Adds a number that depends on the size."""

    def forward(self, x):
        return self.out(self.b(self.a(x) + x.shape[-1] / 16))


@pytest.mark.parametrize("kind", [Rare, Single, Range, Wide])
def test_numbers_that_code_reads_or_makes_of_its_input_are_no_constants(kind):
    torch.manual_seed(0)
    example = images(1 if kind is Single else 2, 3, 16, 16)
    frozen, small = frozen_and_compact(kind(), example)
    for scale in (0.01, 1, 3, 50):
        assert_close(small(scale * example), frozen(scale * example), algorithm="network")
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in frozen.parameters())


def test_numbers_among_the_inputs_are_no_constants():
    class Timed(Net):
        def __init__(self):
            super().__init__(kernel=1)

        def forward(self, x, time=1.0):
            return self.out(self.b(self.a(x) + time))

    frozen, small = frozen_and_compact(Timed(), (images(2, 3, 16, 16), 1.0))
    assert_close(small(images(2, 3, 16, 16), 3.0), frozen(images(2, 3, 16, 16), 3.0), algorithm="network")


def test_a_flag_among_the_inputs_that_would_change_what_closed_channels_leave_is_refused():
    class Flagged(Net):
        def __init__(self):
            super().__init__(kernel=1)

        def forward(self, x, negative=False):
            h = self.a(x)
            return self.out(self.b(1 - h if negative else h))

    with pytest.raises(ValueError, match="compact: .* on another bool among the inputs"):
        frozen_and_compact(Flagged(), (images(2, 3, 16, 16), False))


def test_tensors_in_objects_among_the_inputs_are_refused():
    class Shifted(Net):
        def forward(self, x, shift):
            return self.out(self.b(self.a(x) + shift.logits))

    with pytest.raises(TypeError, match="example_input must hold its tensors in tuples, lists and dicts, got one in a"):
        gatedconv.gate_model(Shifted().eval(), "channel", example_input=(images(2, 3, 16, 16), Scores(torch.ones(1))))


def test_a_layer_gate_keeps_the_batch_of_a_norm_without_running_statistics():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12, track_running_stats=False)

        def forward(self, x):
            return x + self.norm(self.conv(x))

    model = nn.Sequential(block(3, 12), Residual()).eval()
    gated = gatedconv.gate_model(model, "layer", example_input=images(4, 3, 16, 16)).eval()
    (gate,) = gatedconv.gates(gated).values()
    nn.init.normal_(gate.fc2.weight)
    gated(images(4, 3, 16, 16))
    gate.fc2.bias.data -= gate.logits.median() + 1e-4
    with torch.no_grad():
        got, x = gated(images(4, 3, 16, 16)), model[0](images(4, 3, 16, 16))
        decision = (gate.logits > 0).float()[..., None, None]
        assert 0 < decision.sum() < 4
        assert_close(got, x + decision * model[1].norm(model[1].conv(x)), algorithm="network")


def test_a_network_that_has_a_name_of_ours_is_refused_where_that_would_be_replaced(tmp_path):
    class Segments(Net):
        def __init__(self):
            super().__init__()
            self.consensus = "avg"

        def forward(self, x):
            scores = super().forward(x)
            return scores.mean((2, 3)) if self.consensus == "avg" else scores.amax((2, 3))

    model = Segments().eval()
    with pytest.raises(ValueError, match="gate_model: Segments has an attribute 'consensus' of its own"):
        gatedconv.gate_model(model, "channel", example_input=images(2, 3, 16, 16))
    small = gatedconv.compact(model, images(2, 3, 16, 16))
    assert small.consensus == "avg"
    assert_close(small(images(2, 3, 16, 16)), model(images(2, 3, 16, 16)), algorithm="network")


@pytest.mark.parametrize("options", [{"ceil_mode": True}, {"padding": 1}, {"padding": (1, 1), "ceil_mode": True}])
def test_a_pool_of_torch_functional_sees_its_border(options):
    class Pooled(Net):
        def forward(self, x):
            return self.out(self.b(F.avg_pool2d(self.a(x) + 1, 3, 2, **options)))

    frozen, small = frozen_and_compact(Pooled(), images(2, 3, 16, 16))
    assert_close(small(images(2, 3, 16, 16)), frozen(images(2, 3, 16, 16)), algorithm="network")
