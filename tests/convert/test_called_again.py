"""Layers that a network calls several times in one forward: heads on a pyramid, twin towers, recurrent cells."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import gatedconv
from gatedconv.gating import fisher_information
from gatedconv.gating.pruner import MOMENTUM
from tests.convert.unusual import images
from tests.tolerances import WHOLE, assert_close


class Heads(nn.Module):
    """A pyramid of two levels that one head reads, as in RetinaNet (without norms) and FCOS (group norms)."""

    def __init__(self, norm=nn.Identity, checkpointed=False):
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(3, 12, 3, padding=1, stride=2), nn.BatchNorm2d(12)
        self.c2, self.b2 = nn.Conv2d(12, 24, 3, padding=1, stride=2), nn.BatchNorm2d(24)
        self.l1, self.l2 = nn.Conv2d(12, 16, 1), nn.Conv2d(24, 16, 1)
        layers = [layer for _ in range(2) for layer in (nn.Conv2d(16, 16, 3, padding=1), norm(16), nn.ReLU())]
        self.tower, self.out = nn.Sequential(*layers), nn.Conv2d(16, 5, 3, padding=1)
        self.checkpointed = checkpointed

    def head(self, x):
        return self.out(self.tower(x)).flatten(2)

    def forward(self, x):
        a = self.b1(self.c1(x)).relu()
        top = self.l2(self.b2(self.c2(a)).relu())
        levels = self.l1(a) + F.interpolate(top, scale_factor=2.0), top
        run = partial(checkpoint, self.head, use_reentrant=False) if self.checkpointed else self.head
        return torch.cat([run(level) for level in levels], dim=2)


class Block(nn.Module):
    """A residual block."""

    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Twins(nn.Module):
    """Two images in one tensor go through the same tower."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.block1, self.block2, self.fc = Block(12), Block(12), nn.Linear(12, 4)

    def tower(self, x):
        return self.block2(self.block1(self.stem(x))).mean((2, 3))

    def forward(self, x):
        return self.fc((self.tower(x) - self.tower(x.flip(1) * 2)).abs())


class Separable(nn.Module):
    """A pointwise and a depthwise convolution, called in turn, or each for all inputs before the other."""

    def __init__(self, in_turn=True):
        super().__init__()
        self.point, self.norm1 = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16)
        self.depth, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16)
        self.out, self.in_turn = nn.Conv2d(16, 4, 1), in_turn

    def forward(self, x):
        def first(x):
            return F.relu(self.norm1(self.point(x)))

        def second(x):
            return self.out(F.relu(self.norm2(self.depth(x))))

        if self.in_turn:
            return second(first(x)) + second(first(x.flip(3))).sigmoid()
        a, b = first(x), first(x.flip(3))
        return second(a) + second(b).sigmoid()


class Recurrent(nn.Module):
    """A cell that reads its own state."""

    def __init__(self):
        super().__init__()
        self.inside, self.cell = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.inside(x).relu()
        state = torch.zeros_like(x)
        for _ in range(3):
            state = self.cell(torch.cat([x, state], dim=1)).tanh()
        return self.out(state)


class Activation(nn.Module):
    """One PReLU, with one number, behind layers of different widths."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 4, 1)
        self.act = nn.PReLU()

    def forward(self, x):
        return self.out(self.act(self.b(self.act(self.a(x)))))


class Constants(nn.Module):
    """One layer reads two maps whose closed channels hold different constants."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.shared, self.out = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.out(self.shared(self.a(x).sigmoid()).relu() + self.shared(self.b(x).relu()).cos())


NETWORKS = {
    "heads": Heads,
    "group norms": partial(Heads, partial(nn.GroupNorm, 4)),
    "batch norms": partial(Heads, nn.BatchNorm2d),
    "twins": Twins,
    "separable": Separable,
    "all before the next": partial(Separable, False),
    "recurrent": Recurrent,
    "activation": Activation,
    "constants": Constants,
}
X = images(2, 3, 16, 16)


def network(name):
    """In eval mode, its norms as after training."""
    torch.manual_seed(0)
    model = NETWORKS[name]()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            numbers = [module.weight.data, module.bias.data]
            for tensor in (*numbers, *(b for b in module.buffers() if b.is_floating_point())):
                tensor.uniform_(0.5, 1.5)
    return model.eval()


def masks_of(gated, share, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(g.num_gates, generator=generator) < share for n, g in gatedconv.gates(gated).items()}


@torch.no_grad()
def oracle(model, masks, x, follow):
    """The dense model; what each module with a gate returns is multiplied, in every call."""
    model = copy.deepcopy(model)

    def multiply(path, mask):
        module = model.get_submodule(path)
        if isinstance(module, Block):  # all that its branch returns
            path, module = f"{path}.bn2", module.bn2

        def hook(module, args, out):
            return out * mask.repeat_interleave(out.shape[1] // len(mask)).reshape(1, -1, 1, 1)

        module.register_forward_hook(hook)

    for gate, mask in masks.items():
        multiply(gate.rpartition(".")[0], mask)
    for path, gate in follow.items():
        multiply(path, masks[gate])
    return model(x)


@pytest.mark.parametrize(
    ("name", "gate"), [*((name, "channel") for name in NETWORKS), ("twins", "layer"), ("twins", "both")]
)
def test_what_is_left_is_exact(name, gate):
    model = network(name)
    gated = gatedconv.gate_model(model, gate, example_input=X).eval()
    follow = {"norm2": "norm1.channel_gate"} if name == "separable" else {}
    larger = images(3, 3, 24, 16)
    for share, seed in [(0.5, 0), (0.5, 1), (0.8, 2), (0.1, 3), (0.0, 4), (1.0, 5)]:
        masks = masks_of(gated, share, seed)
        frozen = gatedconv.freeze(gated, masks=masks).eval()
        small = gatedconv.compact(frozen, X)
        for x in (X, larger):
            expected = oracle(model, masks, x, follow)
            with torch.no_grad():
                assert_close(frozen(x), expected)
                assert_close(small(x), expected)


def test_the_layers_have_gates_and_become_smaller():
    gated = gatedconv.gate_model(network("heads"), "channel", example_input=X)
    assert set(gatedconv.gates(gated)) == {f"{at}.channel_gate" for at in "b1 b2 l1 l2 tower.0 tower.3".split()}
    assert gatedconv.gates(gated)["tower.0.channel_gate"].calls == 2
    masks = {name: torch.ones(gate.num_gates, dtype=torch.bool) for name, gate in gatedconv.gates(gated).items()}
    masks["tower.0.channel_gate"][4:] = False
    masks["l2.channel_gate"][:12] = False  # and so the top level, but not the one below it
    masks["l1.channel_gate"][:8] = False
    small = gatedconv.compact(gatedconv.freeze(gated, masks=masks), X)
    sizes = {
        path: (layer.in_channels, layer.out_channels)
        for path, layer in small.named_modules()
        if path[:5] == "tower" and isinstance(layer, nn.Conv2d)
    }
    assert sizes == {"tower.0": (8, 4), "tower.3": (4, 16)}


@pytest.mark.parametrize(
    ("name", "gate"), [("twins", "channel"), ("twins", "layer"), ("twins", "both"), ("activation", "channel")]
)
def test_macs_are_those_of_the_smaller_network(name, gate):
    gated = gatedconv.gate_model(network(name), gate, example_input=X).eval()
    assert gated.conversion.estimated == {}
    assert sum(term.params for term in gated.mac_terms) == sum(p.numel() for p in network(name).parameters())
    for seed in range(3):
        masks = masks_of(gated, 0.5, seed)
        small = gatedconv.compact(gatedconv.freeze(gated, masks=masks), X)
        expected = gatedconv.expected_macs(gated, {name: mask.float() for name, mask in masks.items()})
        assert float(expected) == pytest.approx(gatedconv.count_macs(small, X[:1]), **WHOLE)
    heads = gatedconv.gate_model(network("heads"), "channel", example_input=X)
    assert heads.conversion.reachable_macs > 0.99
    assert set(heads.conversion.estimated) == {"", "tower.0"}  # what reads sums of two layers with gates


def with_lively_gates(name):
    gated = gatedconv.gate_model(network(name), "channel", example_input=X).train()
    torch.manual_seed(2)
    for gate in gatedconv.gates(gated).values():
        nn.init.normal_(gate.fc2.weight, std=1.0)
    return gated


def decisions_of(gated):
    """The decisions of every gate, call by call, which its forward adds to."""
    found = {name: [] for name in gatedconv.gates(gated)}
    for name, gate in gatedconv.gates(gated).items():
        gate.register_forward_hook(lambda gate, args, out, name=name: found[name].append(out))
    return found


@pytest.mark.parametrize("name", ["heads", "twins", "recurrent"])
def test_rates_and_losses_are_over_all_calls(name):
    gated = with_lively_gates(name)
    for mode in (True, False):
        gated.train(mode)
        for _ in range(2):  # what the first forward leaves does not count
            found = decisions_of(gated)
            gated(X)
        rates = [torch.cat(calls).mean(0) for calls in found.values()]
        for gate, rate in zip(gatedconv.gates(gated).values(), rates, strict=True):
            assert len(gate.logits) == gate.calls * len(X)
            assert_close(gate.open_rate, rate)
    gated.train()
    found = decisions_of(gated)
    gated(X)
    loss = torch.stack([((1 - r) * r).mean() for r in (torch.cat(calls).mean(0) for calls in found.values())]).mean()
    assert float(loss.detach()) > 0.01
    parameters = [p for gate in gatedconv.gates(gated).values() for p in gate.parameters()]
    expected = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    assert_close(gatedconv.polarization_loss(gated), loss)
    actual = torch.autograd.grad(gatedconv.polarization_loss(gated), parameters, materialize_grads=True)
    largest = max(float(gradient.abs().max()) for gradient in expected)  # in front of a norm they cancel to 0
    assert largest > 1e-4
    assert_close(actual, expected, algorithm="gradient", scale=largest)


def step_of(model, gated):
    """Loss and gradients of one step, and the rows of each gate's logits after it."""
    gated.zero_grad()
    out = model(X)
    loss = out.square().mean() + gatedconv.polarization_loss(model) + gatedconv.mac_target_loss(model, 0.5)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in gated.named_parameters() if p.grad is not None}
    return loss.detach(), grads, {name: gate.logits.shape for name, gate in gatedconv.gates(gated).items()}


@pytest.mark.parametrize("way", ["checkpointed", "compiled"])
def test_checkpoints_and_compilation_change_nothing(way):
    gated = with_lively_gates("batch norms")
    other = copy.deepcopy(gated)
    other.checkpointed = way == "checkpointed"
    run = torch.compile(other, backend="aot_eager") if way == "compiled" else other
    for _ in range(2):
        loss, grads, shapes = step_of(gated, gated)
        other_loss, other_grads, other_shapes = step_of(run, other)
        assert_close(other_loss, loss)
        largest = max(float(gradient.abs().max()) for gradient in grads.values())
        assert_close(other_grads, grads, algorithm="gradient", scale=largest)
        assert other_shapes == shapes


@pytest.mark.parametrize("way", ["gate_model", "Conv2d", "a method"])
def test_the_number_of_calls_may_change(way):
    class Loop(nn.Module):
        times = 2

        def __init__(self):
            super().__init__()
            gate = {"gate": "channel"} if way == "Conv2d" else {}
            self.stem, self.conv = nn.Conv2d(3, 8, 3), gatedconv.Conv2d(8, 8, 3, padding=1, **gate)
            self.out = nn.Conv2d(8, 4, 1)

        def again(self, x):
            x = self.stem(x)
            for _ in range(self.times):
                x = self.conv(x).relu()
            return self.out(x)

        def forward(self, x):
            return self.again(x)

    model = Loop()
    if way == "Conv2d":
        gatedconv.attach_macs(model, X)
    else:
        model = gatedconv.gate_model(model, "channel", example_input=X)
    gate = list(gatedconv.gates(model).values())[-1]
    assert gate.calls == 2
    for model.times, rows in [(2, 4), (1, 2), (2, 4), (3, 4), (1, 2)]:  # of the last two calls
        out = model.train()(X) if way != "a method" else model.again(X)
        if way != "a method" or model.times != 3:
            assert gate.logits.shape == (rows, 8)
        (out.square().mean() + gate.open_rate.mean()).backward()
        if way != "a method":
            with torch.no_grad():
                model.eval()(X)
            assert gate.logits.shape == (rows, 8)


def test_a_checkpoint_of_half_a_repeated_branch_is_refused():
    class Half(Block):
        def branch(self, x):
            return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))

        def forward(self, x):
            return x + (checkpoint(self.branch, x, use_reentrant=False) if self.training else self.branch(x))

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block = nn.Conv2d(3, 8, 3), Half(8)

        def forward(self, x):
            x = self.block(self.stem(x))
            return self.block(x.tanh())

    with pytest.raises(ValueError, match="the end of what block.layer_gate gates, but not its start, and runs several"):
        gatedconv.gate_model(Loop(), "layer", example_input=X)
    gated = gatedconv.gate_model(Loop(), "channel", example_input=X).train()
    gated(X).square().mean().backward()


@pytest.mark.parametrize(
    "layer", [nn.PReLU(16), nn.BatchNorm2d(16), nn.GroupNorm(4, 16), nn.GroupNorm(4, 16, affine=False)]
)
def test_a_layer_behind_several_gates_keeps_what_one_of_them_leaves(layer):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
            self.norm1, self.norm2 = nn.GroupNorm(4, 16), nn.GroupNorm(4, 16)
            self.shared, self.out = copy.deepcopy(layer), nn.Conv2d(16, 4, 3, padding=1)

        def forward(self, x):
            x = self.shared(self.norm1(self.a(x)).relu())
            return self.out(self.shared(self.norm2(self.b(x)).relu()))

    model = Shared().eval()
    gated = gatedconv.gate_model(model, "channel", example_input=X).eval()
    masks = {"norm1.channel_gate": torch.arange(4) < 3, "norm2.channel_gate": torch.arange(4) == 1}
    frozen = gatedconv.freeze(gated, masks=masks).eval()
    small = gatedconv.compact(frozen, X, verify=False)
    with torch.no_grad():
        assert_close(small(X), oracle(model, masks, X, {}))
    assert small.a.out_channels == 12 and small.b.out_channels == 4


def test_each_call_has_its_own_threshold():
    gate = gatedconv.ChannelGate(4, estimator="batch_mean", hidden=None).train()
    gate.calls = 2
    gate.fc2.weight.data.copy_(torch.eye(4))
    gate.fc2.bias.data.zero_()
    x = torch.tensor([[-0.2] * 4, [0.2] * 4])[:, :, None, None]
    gate(x + 5)
    gate(x - 5)
    assert not gate.saturated.any() and not gate.dead.any()


def test_closed_samples_of_repeated_blocks_are_not_computed():
    gated = gatedconv.gate_model(network("twins"), "layer", example_input=X).eval()
    for gate in gatedconv.gates(gated).values():
        gate.fc2.bias.data.fill_(-1.0)
    rows = []
    gated.block1.conv1.register_forward_hook(lambda layer, args, out: rows.append(len(args[0])))
    with torch.no_grad():
        out = gated(X)
    assert rows == [0, 0]
    with torch.no_grad():
        assert_close(out, oracle(network("twins"), dict.fromkeys(gatedconv.gates(gated), torch.zeros(1)), X, {}))


def test_sensitivities_of_the_calls_add_up():
    gated = with_lively_gates("twins")
    pruner = gatedconv.GatePruner(gated)
    found = decisions_of(gated)
    out = gated(X)
    for calls in found.values():
        for decision in calls:
            decision.retain_grad()
    out.square().mean().backward()
    expected = []
    for calls in found.values():
        running = torch.zeros(calls[0].shape[1])
        expected.append(running.lerp(sum((d.grad * len(X)).square().mean(0) for d in calls), MOMENTUM))
    assert_close(pruner.sensitivity, torch.cat(expected), algorithm="gradient")


def test_fisher_information_closes_all_calls_together():
    gated = with_lively_gates("twins")
    labels = torch.tensor([1, 3])
    found = fisher_information(gated, [(X, labels)], F.cross_entropy)
    model, taps = copy.deepcopy(gated), {}
    for name, gate in gatedconv.gates(model).items():
        taps[name] = torch.ones(len(X), gate.num_gates, requires_grad=True)
        gate.register_forward_hook(lambda gate, args, out, name=name: taps[name])
    (F.cross_entropy(model.train()(X), labels) * len(X)).backward()
    expected = {name: tap.grad.double().square().mean(0) for name, tap in taps.items()}
    assert_close(found, expected, algorithm="gradient")


def test_fisher_information_keeps_the_samples_of_other_calls_apart():
    class Chunks(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc, self.parts = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), 2

        def forward(self, x):
            return self.fc(torch.cat([self.conv(part).relu().mean((2, 3)) for part in x.chunk(self.parts)]))

    gated = gatedconv.gate_model(Chunks(), "channel", example_input=X)
    batch = [(images(4, 3, 16, 16), torch.tensor([0, 1, 2, 3]))]
    found = fisher_information(gated, batch, F.cross_entropy)
    gated.parts = 1
    assert_close(found, fisher_information(gated, batch, F.cross_entropy), algorithm="gradient")


def test_a_vote_counts_every_call():
    gated = with_lively_gates("twins").eval()
    found = decisions_of(gated)
    with torch.no_grad():
        gated(X)
    rates = {name: torch.cat(calls).mean(0) for name, calls in found.items()}
    with pytest.warns(UserWarning, match="agree"):
        frozen = gatedconv.freeze(gated, [X])
    assert_close(frozen.consensus.open_rates, rates)


def test_files_keep_the_number_of_calls(tmp_path):
    gated = gatedconv.gate_model(network("twins"), "both", example_input=X).eval()
    gatedconv.save(gated, tmp_path / "gated.safetensors")
    loaded = gatedconv.load(tmp_path / "gated.safetensors", into=Twins())
    assert {gate.calls for gate in gatedconv.gates(loaded).values()} == {2}
    loaded = gatedconv.load(tmp_path / "gated.safetensors")
    assert {gate.calls for gate in gatedconv.gates(loaded).values()} == {2}
    small = gatedconv.compact(gatedconv.freeze(gated, masks=masks_of(gated, 0.5)), X)
    gatedconv.save(small, tmp_path / "small.safetensors")
    with torch.no_grad():
        assert_close(gatedconv.load(tmp_path / "small.safetensors")(X), small(X))
        assert_close(gatedconv.load(tmp_path / "small.safetensors", into=Twins())(X), small(X))


@pytest.mark.parametrize("name", ["twins", "batch norms", "recurrent"])
def test_the_engine_runs_every_call(name):
    gated = gatedconv.gate_model(network(name), "channel", example_input=X).eval()
    small = gatedconv.compact(gatedconv.freeze(gated, masks=masks_of(gated, 0.5)), X)
    with torch.no_grad():
        assert_close(gatedconv.Engine(small, X)(X), small(X))


def test_a_depthwise_layer_follows_only_where_the_two_are_called_in_turn():
    in_turn = gatedconv.gate_model(network("separable"), "channel", example_input=X)
    assert list(gatedconv.gates(in_turn)) == ["norm1.channel_gate"]
    assert in_turn.conversion.skipped["depth"] == "depthwise: the gate of point closes its channels too"
    before = gatedconv.gate_model(network("all before the next"), "channel", example_input=X)
    assert list(gatedconv.gates(before)) == ["norm1.channel_gate", "norm2.channel_gate"]


def test_calls_that_end_differently_are_left_alone_with_the_reason():
    class Levels(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.norm1, self.norm2, self.norm3 = (nn.BatchNorm2d(8) for _ in range(3))
            self.out = nn.Conv2d(8, 4, 1)

        def forward(self, x):
            x = self.norm3(self.first(x)).relu()
            return self.out(self.norm1(self.conv(x)).relu() + self.norm2(self.conv(x.flip(2))).relu())

    gated = gatedconv.gate_model(Levels().eval(), "channel", example_input=X)
    assert gated.conversion.skipped["conv"] == "its 2 calls end in different modules, norm1 and norm2"
    masks = masks_of(gated, 0.5)
    small = gatedconv.compact(gatedconv.freeze(gated, masks=masks), X)
    assert small.conv.in_channels == int(masks["norm3.channel_gate"].sum())
