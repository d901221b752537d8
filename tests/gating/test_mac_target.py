"""Consensus of a given size, the price of MACs, and gates shut in order of rank."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

import gatedconv
from gatedconv.deploy import compact, freeze
from gatedconv.gating import (
    GatePruner,
    MacController,
    expected_macs,
    find_gates,
    fisher_information,
    gate_macs,
    losses,
    masks_for_target,
    mean_logits,
    polarization_loss,
    schedules,
)
from gatedconv.measure.macs import count_macs
from gatedconv.models import resnet20
from tests.tolerances import assert_close, near

SIZE = (3, 8, 8)


def network(gate: str = "channel", **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return resnet20(4, gate, "middle", input_size=SIZE, **options)


def random_scores(model: torch.nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(gate.num_gates, generator=generator) for name, gate in find_gates(model).items()}


@pytest.mark.parametrize("target", [0.25, 0.5, 0.75, 0.9])
def test_masks_meet_the_target_by_the_count_of_the_compact_network(target: float) -> None:
    model, image = network(), torch.zeros(1, *SIZE)
    masks = masks_for_target(model, random_scores(model), target)
    dense = count_macs(resnet20(4, input_size=SIZE).eval(), image)
    small = compact(freeze(model, masks=masks).eval(), image)
    assert count_macs(small, image) == pytest.approx(target * dense, rel=0.02)


def test_what_scores_least_is_closed() -> None:
    model = network()
    scores = random_scores(model)
    masks = masks_for_target(model, scores, 0.5)
    opened = torch.cat([scores[name][mask] for name, mask in masks.items()])
    closed = torch.cat([scores[name][~mask] for name, mask in masks.items()])
    assert closed.max() < opened.min()


def test_everything_may_stay_open() -> None:
    model = network()
    assert all(mask.all() for mask in masks_for_target(model, random_scores(model), 1.0).values())


@pytest.mark.parametrize("target", [0.0, -1.0, 1.5])
def test_a_target_outside_its_range(target: float) -> None:
    with pytest.raises(ValueError, match=r"target must be in \(0, 1\]"):
        masks_for_target(network(), {}, target)


def test_scores_that_do_not_fit() -> None:
    model = network()
    scores = random_scores(model)
    name = next(iter(scores))
    with pytest.raises(ValueError, match=r"expected scores \(16,\) of 'layer1.0.channel_gate', got \(3,\)"):
        masks_for_target(model, scores | {name: torch.zeros(3)}, 0.5)
    with pytest.raises(ValueError, match="not finite"):
        masks_for_target(model, scores | {name: torch.full((16,), torch.nan)}, 0.5)


def test_gate_macs_are_what_closing_one_gate_saves() -> None:
    model = network("both")
    costs = gate_macs(model)
    full = {name: torch.ones(gate.num_gates, dtype=torch.float64) for name, gate in find_gates(model).items()}
    for name in ("layer1.0.channel_gate", "layer2.0.layer_gate", "layer3.2.channel_gate"):
        rates = full | {name: full[name].clone()}
        rates[name][0] = 0
        saved = float(expected_macs(model, full)) - float(expected_macs(model, rates))
        assert float(costs[name][0]) == near(saved)


def test_fisher_information_is_the_mean_square_of_each_samples_gradient() -> None:
    model = network()
    images, labels = torch.randn(6, *SIZE), torch.randint(4, (6,))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = fisher_information(model, [(images, labels)], functional.cross_entropy)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    # By hand: scale the gated map of the last block by ones and differentiate each sample's loss.
    model.train()
    ones = torch.ones(6, 64, requires_grad=True)
    block = model.layer3[2]
    block.conv2.register_forward_pre_hook(lambda _, inputs: (inputs[0] * ones[:, :, None, None],))
    for gate in find_gates(model).values():
        torch.nn.init.constant_(gate.fc2.bias, 5.0)  # all open
    losses = functional.cross_entropy(model(images), labels, reduction="sum")
    (slope,) = torch.autograd.grad(losses, ones)
    assert_close(found["layer3.2.channel_gate"].float(), slope.square().mean(0), algorithm="gradient")


class SometimesShorter(torch.nn.Module):
    """Leaves its second block out in every other forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = gatedconv.Conv2d(3, 4, 3, gate="channel")
        self.second = gatedconv.Conv2d(4, 4, 3, padding=1, gate="channel")
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        self.calls += 1
        return (x if self.calls % 2 else self.second(x)).mean((2, 3))


def test_fisher_information_of_a_network_that_leaves_blocks_out() -> None:
    batches = [(torch.randn(4, 3, 8, 8), torch.arange(4)) for _ in range(4)]
    found = fisher_information(SometimesShorter(), batches, functional.cross_entropy)
    assert all(bool((values > 0).all()) for values in found.values())


def test_mean_logits_are_those_of_all_batches() -> None:
    model = network().eval()
    batches = [(torch.randn(3, *SIZE), torch.zeros(3)), (torch.randn(1, *SIZE), torch.zeros(1))]
    found = mean_logits(model, batches)
    model(torch.cat([images for images, _ in batches]))
    for name, gate in find_gates(model).items():
        assert gate.logits is not None
        assert_close(found[name].float(), gate.logits.mean(0), algorithm="gradient")


@pytest.mark.parametrize("pull", [0.05, 0.3])
def test_the_price_lands_on_the_target_against_a_steady_pull(monkeypatch: pytest.MonkeyPatch, pull: float) -> None:
    """The closed loop on a simulated network, whose task gives up MACs as their price nears ``pull``.

    Its share follows 1 - price / pull with a lag of ten steps. With a gain of pull / 50 the loop is damped critically:
    damping is sqrt(50 / 10) / 2 = 1.1.
    """
    share, target = torch.ones(()), 0.7
    monkeypatch.setattr(losses, "mac_terms", lambda *_: [SimpleNamespace(macs=1.0)])
    monkeypatch.setattr(losses, "global_open_rates", lambda *_: {})
    monkeypatch.setattr(losses, "expected_macs", lambda *_: share)
    controller, shares = MacController(pull / 50), []
    for _ in range(300):
        controller(torch.nn.Identity(), target)
        share += 0.1 * (1 - controller.price / pull - share)
        shares.append(float(share))
    assert shares[-1] == pytest.approx(target, abs=1e-3) and min(shares) > target - 0.02
    assert float(controller.price) == pytest.approx(pull * (1 - target), rel=1e-2)  # what holds the balance


def test_the_price_adds_up_the_distances_from_the_target() -> None:
    model, controller, expected = network().train(), MacController(0.2), 0.0
    full = float(expected_macs(model, {n: torch.ones(g.num_gates) for n, g in find_gates(model).items()}))
    for bias in (1.0, 0.0, -1.0):
        for gate in find_gates(model).values():
            torch.nn.init.constant_(gate.fc2.bias, bias)
        model(torch.randn(4, *SIZE))
        share = float(expected_macs(model).detach()) / full
        expected += 0.2 * (share - 0.7)
        loss = controller(model, 0.7)
        assert float(controller.price) == near(expected, terms=3, scale=1.0)
        assert float(loss.detach()) == near(expected * share, terms=3, scale=1.0)
    assert set(controller.state_dict()) == {"price"}
    with pytest.raises(ValueError, match=r"target must be in \(0, 1\]"):
        controller(model, 0.0)
    with pytest.raises(ValueError, match="gain must be above 0"):
        MacController(0.0)


def test_the_pruner_follows_the_target_and_what_is_closed_stays_closed() -> None:
    model = network().train()
    pruner = GatePruner(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    full = float(expected_macs(model, {n: torch.ones(g.num_gates) for n, g in find_gates(model).items()}))
    shut = torch.zeros_like(pruner.pruned)
    generator = torch.Generator().manual_seed(1)
    for step in range(30):
        images, labels = torch.randn(16, *SIZE, generator=generator), torch.randint(4, (16,), generator=generator)
        loss = functional.cross_entropy(model(images), labels) + 3 * polarization_loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        wanted = schedules.falling(min(1.0, step / 20), 0.5, 0.2, 1.0)
        pruner.prune(wanted)
        assert (pruner.pruned | ~shut).all()  # nothing opens again
        shut = pruner.pruned.clone()
        model(images)
        assert float(expected_macs(model).detach()) <= wanted * full * 1.001
    assert float(expected_macs(model).detach()) >= 0.48 * full
    model.eval()
    gates = torch.cat([gate(images_of(gate)) for gate in find_gates(model).values()], dim=1)
    assert torch.equal(gates.mean(0) == 0, shut) or (gates[:, shut] == 0).all()
    assert (gates[:, shut] == 0).all() and 0 < int(shut.sum()) < len(shut)


@pytest.mark.parametrize("ramp", [25, 30, 39])
def test_steps_prune_to_the_end_of_a_ramp_that_ends_between_two_prunings(ramp: int) -> None:
    model = network().train()
    pruner, before = GatePruner(model), []
    full = float(expected_macs(model, {n: torch.ones(g.num_gates) for n, g in find_gates(model).items()}))
    sizes = [gate.num_gates for gate in find_gates(model).values()]
    for step in range(1, ramp + 3):
        model(torch.randn(8, *SIZE)).square().mean().backward()
        if step == ramp:  # as a run that resumes
            state = pruner.state_dict()
            pruner.detach()
            pruner = GatePruner(model)
            pruner.load_state_dict(state)
        pruner.step(schedules.falling(min(1.0, step / ramp), 0.5, 0.0, 1.0))
        before.append(pruner.pruned.clone())
        if step == ramp + 1:  # on the batch that decided
            rates = torch.cat([gate.open_rate for gate in find_gates(model).values()]).masked_fill(pruner.pruned, 0)
            named = dict(zip(find_gates(model), rates.split(sizes), strict=True))
            assert float(expected_macs(model, named).detach()) <= 0.5 * full * 1.001
    changes = [step for step in range(2, ramp + 3) if not torch.equal(before[step - 1], before[step - 2])]
    assert changes == [20, ramp + 1]


def test_steps_with_one_target_do_not_prune_before_the_20th() -> None:
    model = network().train()
    pruner = GatePruner(model)
    for step in range(1, 21):
        model(torch.randn(8, *SIZE)).square().mean().backward()
        pruner.step(0.5)
        assert bool(pruner.pruned.any()) == (step == 20)


def images_of(gate: torch.nn.Module) -> torch.Tensor:
    return torch.randn(32, gate.in_channels, 4, 4, generator=torch.Generator().manual_seed(3))


def test_the_pruner_ranks_by_sensitivity_per_mac() -> None:
    model = network().train()
    pruner = GatePruner(model)
    model(torch.randn(8, *SIZE))
    pruner.sensitivity.copy_(torch.rand(len(pruner.sensitivity), generator=torch.Generator().manual_seed(0)))
    costs = torch.cat(list(gate_macs(model).values())).float()
    pruner.prune(0.6)
    score = pruner.sensitivity / costs
    assert score[pruner.pruned].max() < score[~pruner.pruned].min()
    other = GatePruner(network())
    other.load_state_dict(pruner.state_dict())
    assert torch.equal(other.pruned, pruner.pruned)


def test_the_pruner_can_take_the_same_share_of_every_gate() -> None:
    """In two goes, and with sensitivities that change between them: within each gate the least are shut."""
    model = network().train()
    pruner = GatePruner(model, even=True)
    sizes = [gate.num_gates for gate in find_gates(model).values()]
    first = torch.rand(sum(sizes), generator=torch.Generator().manual_seed(0)).mul(10).pow(3)
    before = torch.zeros_like(pruner.pruned)
    for wanted, sensitivity in ((0.7, first), (0.5, first.flip(0))):
        model(torch.randn(8, *SIZE))
        pruner.sensitivity.copy_(sensitivity)
        pruner.prune(wanted)
        parts = zip(*(each.split(sizes) for each in (sensitivity, pruner.pruned, before)), strict=True)
        for values, shut, earlier in parts:
            assert values[shut & ~earlier].max() < values[~shut].min() and (shut | ~earlier).all()
        shares = [float(part.float().mean()) for part in pruner.pruned.split(sizes)]
        assert max(shares) - min(shares) <= 1 / min(sizes)
        before = pruner.pruned.clone()


def test_the_sensitivity_is_the_mean_square_of_what_arrives_at_each_sample() -> None:
    """Twice over: the running mean takes in a hundredth of each batch; both batches alone, too."""
    model, arrived = network().train(), {}
    pruner = GatePruner(model)
    for name, gate in find_gates(model).items():

        def keep(gate: torch.nn.Module, arguments: object, decision: torch.Tensor, name: str = name) -> None:
            decision.retain_grad()
            arrived[name] = decision

        gate.register_forward_hook(keep)
    expected = torch.zeros_like(pruner.sensitivity)
    for count in (8, 5):
        functional.cross_entropy(model(torch.randn(count, *SIZE)), torch.arange(count) % 4).backward()
        found = torch.cat([count * decision.grad for decision in arrived.values()], dim=1)
        expected = 0.99 * expected + 0.01 * (found**2).sum(dim=0) / count
        assert (found != 0).any(dim=0).all()
        assert_close(pruner.sensitivity, expected)


def test_a_gradient_that_is_not_finite_leaves_the_sensitivity_alone() -> None:
    model = network().train()
    pruner = GatePruner(model)
    (model(torch.randn(8, *SIZE)).sum() * torch.inf).backward()
    assert pruner.sensitivity.isfinite().all()
    pruner.detach()
    model(torch.randn(8, *SIZE)).sum().backward()
    assert not pruner.sensitivity.any()


def test_the_pruner_needs_gates_that_learn() -> None:
    model = network()
    frozen = freeze(model, masks=masks_for_target(model, random_scores(model), 1.0))
    with pytest.raises(ValueError, match="expected gates that learn, 'layer1.0.channel_gate' does not"):
        GatePruner(frozen)
    with pytest.raises(ValueError, match="no gates"):
        GatePruner(resnet20(4))


@pytest.mark.parametrize(("progress", "value"), [(0.0, 1.0), (0.2, 1.0), (0.45, 0.75), (0.7, 0.5), (1.0, 0.5)])
def test_a_falling_target(progress: float, value: float) -> None:
    assert schedules.falling(progress, 0.5, 0.2, 0.7) == pytest.approx(value)
    with pytest.raises(ValueError, match="start must not come after end"):
        schedules.falling(progress, 0.5, 0.8, 0.7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_macs_are_counted_in_single_precision_under_autocast(dtype: torch.dtype) -> None:
    model = network().train()
    with torch.autocast("cpu", dtype):
        model(torch.randn(4, *SIZE))
        loss = losses.mac_target_loss(model, 0.3)
    loss.backward()
    plain = losses.mac_target_loss(model, 0.3)
    assert float(loss.detach()) == float(plain.detach())
    gradients = [gate.fc2.bias.grad for gate in find_gates(model).values()]
    assert all(found is not None and bool(found.isfinite().all()) for found in gradients)


def test_gates_that_are_not_trained_are_not_pruned() -> None:
    model = network().train()
    pruner = GatePruner(model)
    first, gate = next(iter(find_gates(model).items()))
    for parameter in gate.parameters():
        parameter.requires_grad_(False)
    functional.cross_entropy(model(torch.randn(4, *SIZE)), torch.arange(4)).backward()
    before = gate.fc2.bias.clone()
    pruner.prune(0.5)
    assert torch.equal(gate.fc2.bias, before) and not pruner.pruned[: gate.num_gates].any(), first
    assert pruner.pruned.any()
    for wrong in ("0.5", None, True):
        with pytest.raises(TypeError, match="target must be a number in"):
            pruner.step(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"target must be in \(0, 1\]"):
        pruner.step(0.0)


def test_copies_and_pickles_of_a_watched_model_have_no_pruner(tmp_path: Path) -> None:
    model = network().train()
    pruner = GatePruner(model)
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        functional.cross_entropy(other(torch.randn(4, *SIZE)), torch.arange(4)).backward()
        assert not pruner.sensitivity.any()
    functional.cross_entropy(model(torch.randn(4, *SIZE)), torch.arange(4)).backward()
    assert pruner.sensitivity.any()


def test_a_part_that_carries_the_macs_is_named() -> None:
    with pytest.raises(ValueError, match="its part '0' carries them: pass that"):
        losses.mac_target_loss(torch.nn.Sequential(network()))


def two_layers():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 4, 1))


@pytest.mark.parametrize("training", [True, False])
def test_gates_in_eval_are_ranked_too_and_pruned_ones_stay_closed_without_a_vote(training):
    """Whoever freezes the norms of a network freezes the gates inside them as well."""
    model = gatedconv.gate_model(two_layers(), "channel", example_input=torch.randn(2, 3, 8, 8))
    model.get_submodule("1").train(training)
    model.get_submodule("1").weight.data[:5] = 0.01
    pruner = gatedconv.GatePruner(model)
    for _ in range(5):
        model(torch.randn(16, 3, 8, 8)).square().mean().backward()
    pruner.prune(0.5)
    assert pruner.sensitivity.all()
    assert torch.equal(gatedconv.freeze(model).consensus.masks["1.channel_gate"], ~pruner.pruned)
    assert pruner.pruned[:5].any() and not pruner.pruned[5:].any()


def test_the_pruner_says_what_it_cannot_do():
    model = gatedconv.gate_model(two_layers(), "channel", example_input=torch.randn(2, 3, 8, 8))
    model(torch.randn(2, 3, 8, 8))
    with pytest.warns(UserWarning, match="no gradient has reached the gates yet") as caught:
        gatedconv.GatePruner(model).finish(0.5)
    assert [warning.filename for warning in caught] == [__file__]
    for parameter in model.get_submodule("1.channel_gate").parameters():
        parameter.requires_grad_(False)
    pruner = gatedconv.GatePruner(model)
    pruner.sensitivity.fill_(1)
    with pytest.warns(UserWarning, match=r"GatePruner: .* of the MACs are left, the target is 10.0%") as caught:
        pruner.finish(0.1)
    assert [warning.filename for warning in caught] == [__file__]
