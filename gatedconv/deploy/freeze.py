"""Freezing: the samples vote on each gate, and each gate becomes the constant that the majority chose.

The BatchNorm statistics of training are of other sub-networks: `re_estimate_batchnorm` makes those of the frozen one.
"""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from gatedconv.convert.install import (
    FollowGate,
    GateOutputHook,
    device_of,
    hooks_of,
    keeping_aliases,
    mask_of,
    masks_by_link,
    over_channels,
    skip_closed,
)
from gatedconv.convert.verify import Inputs, as_inputs, tensors_of
from gatedconv.deploy.slicing import zero_channels
from gatedconv.gating import Consensus, FrozenGate, Gate, copied, eval_mode, require_free, unwrap
from gatedconv.gating.collectives import mean_over_ranks, require_same_masks, sum_over_ranks, world_size
from gatedconv.gating.registry import find_gates, require_gates

AGREEMENT_WARNING = 0.99  # below this share of agreeing samples the frozen net is not the one that trained


@torch.inference_mode(False)  # parameters that are made in inference mode cannot be trained
def freeze(
    model: nn.Module, loader: Iterable[Any] | None = None, *, masks: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """A copy of the model whose gates are constants; the original is left as it is.

    Args:
        model: a gated model.
        loader: batches (x, ...) or x, x (N, C, H, W); in (x, ...) also a tuple or dict of the model's arguments. Each
            gate becomes the majority of its eval-mode decisions over all samples, a tie open.
        masks: gate path -> bool (num_gates,), for every gate; decides instead of a vote. With a loader as
            well, the loader only measures agreement.

    With neither, the running open rates of training decide (open at 0.5 and above).

    With several processes every one of them has to call this: votes of each rank's own loader are added up,
    running open rates averaged, and all end with the same masks.

    Returns:
        the frozen copy, with a ``Consensus`` as its attribute ``consensus``.

    Warns:
        UserWarning: where agreement is below 99 %, naming the gates.

    Raises:
        TypeError, ValueError: masks that miss a gate, name an unknown one or have the wrong dtype or
            size; a model without gates or already frozen; a loader without samples; gates that are NaN; masks
            that differ between the ranks.
    """
    gates = require_gates(model, "freeze")
    frozen_already = [name for name, gate in gates.items() if isinstance(gate, FrozenGate)]
    if frozen_already:
        raise ValueError(f"freeze: the model is frozen already (gate {frozen_already[0]!r})")
    require_free(model, "consensus", Consensus, "freeze")
    if masks is not None:
        masks = _checked_masks(gates, masks)
    if loader is not None:
        rates, counts = _vote(model, gates, loader)
    else:
        rates = mean_over_ranks({name: gate.running_open_rate.detach().clone() for name, gate in gates.items()})
        counts = dict.fromkeys(gates, 0 if masks is not None else 1)
    _require_finite(rates)
    masks = masks or {name: rate >= 0.5 for name, rate in rates.items()}
    require_same_masks(masks, "freeze")
    rates = {name: rate.to(torch.get_default_dtype()) for name, rate in rates.items()}
    frozen = freeze_gates(model, masks)
    consensus = _consensus(masks, rates, counts)
    vars(frozen)["consensus"] = consensus  # typed here; Module.__setattr__ is not
    _warn(consensus)
    return frozen


def freeze_gates(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """The copying half of ``freeze``: every gate replaced by the constant ``masks[path]``."""
    frozen = copied(model)
    constants = {gate: FrozenGate(masks[name]) for name, gate in find_gates(frozen).items()}
    for name, module in list(frozen.named_modules(remove_duplicate=False)):  # a gate may be held twice
        if isinstance(module, Gate):
            parent, _, attribute = name.rpartition(".")
            setattr(frozen.get_submodule(parent), attribute, constants[module])
    with keeping_aliases(frozen):
        skip_closed(frozen)
    _zero_closed_norms(frozen)
    return frozen


def _zero_closed_norms(frozen: nn.Module) -> None:
    """Let BatchNorms that a gate follows make zeros of closed channels themselves.

    So code that fuses norms into convolutions, and drops them with the gates behind, keeps computing the same.
    """
    links = masks_by_link(frozen)
    owners = Counter(id(p) for module in frozen.modules() for p in module._parameters.values())
    for module in frozen.modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        for hook in hooks_of(module):
            closes = isinstance(hook, (GateOutputHook, FollowGate)) and hook.alone
            mask = mask_of(hook, module, links) if closes else None
            if mask is not None and module.affine and owners[id(module.weight)] == owners[id(module.bias)] == 1:
                zero_channels(module, over_channels(~mask, module.num_features))


@torch.no_grad()
def re_estimate_batchnorm(model: nn.Module, batches: Iterable[Any]) -> None:
    """Re-estimate the running statistics of every BatchNorm as plain means over batches, in place.

    The running statistics were collected on other sub-networks: re-estimate them after `freeze`, and
    before `compact`. Weights and modes are unchanged; so are the statistics where an exception ends it, and those of
    norms that no batch reaches (of an auxiliary head, of another domain). With several processes every one of them has
    to call this, each with batches of its own: the means are those over all batches.

    Args:
        model: a network whose weights are those to be used; training on moves the statistics again.
        batches: (images (N, C, H, W), ...) or images as in training, augmentation included; at least one. They are
            moved to the model's device.

    Raises:
        TypeError: what is given is no loader, or a batch holds no tensor.
        ValueError: there are no batches, or their statistics are not finite; the statistics of before are kept.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    done = False
    with eval_mode(model):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative mean
                norm.train()
            count = 0
            device = device_of(model)
            for batch in _require_batches(batches, "re_estimate_batchnorm"):
                _run(model, _inputs(batch, "re_estimate_batchnorm", device), "re_estimate_batchnorm")
                count += 1
            if not count:
                raise ValueError("re_estimate_batchnorm: expected at least one batch, got none")
            _average_statistics(norms)
            if not all(bool(t.isfinite().all()) for norm in norms for t in norm.buffers()):
                raise ValueError("re_estimate_batchnorm: the statistics of these batches are not finite numbers")
            done = True
        finally:
            for norm, momentum, buffers in zip(norms, momenta, before, strict=True):
                norm.momentum = momentum
                if not (done and norm.num_batches_tracked):
                    norm.load_state_dict(buffers, strict=False)


def _average_statistics(norms: Sequence[nn.modules.batchnorm._BatchNorm]) -> None:
    """Make the statistics of norms the means over the batches of all ranks."""
    if world_size() == 1:
        return
    statistics, counts = dict[str, Tensor](), dict[str, int]()
    for place, norm in enumerate(norms):
        for name in ("running_mean", "running_var"):
            statistics[f"{place} {name}"] = getattr(norm, name)
            counts[f"{place} {name}"] = int(norm.num_batches_tracked or 0)
    sums, batches = sum_over_ranks({key: s.double() * counts[key] for key, s in statistics.items()}, counts)
    for key, statistic in statistics.items():
        statistic.copy_(sums[key] / max(1, batches[key]))
    for place, norm in enumerate(norms):
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.fill_(batches[f"{place} running_mean"])


def _require_batches(loader: Any, owner: str) -> Iterable[Any]:
    try:
        if not isinstance(loader, Tensor):
            return iter(loader)
    except TypeError:  # no iterable
        pass
    raise TypeError(f"{owner}: expected a loader, an iterable of batches, got {type(loader).__name__}")


def _inputs(batch: Any, owner: str, device: torch.device | None = None) -> Inputs:
    """The arguments in a batch, x or (x, ...): x is a tensor or, in (x, ...), a tuple or dict of arguments."""
    inside = isinstance(batch, (tuple, list)) and len(batch) > 0
    x = batch[0] if inside else batch
    if not isinstance(x, (Tensor, tuple, list, Mapping) if inside else Tensor) or not tensors_of(x):
        raise TypeError(f"{owner}: the loader must yield tensors or (tensor, ...), got {type(x).__name__}")
    return tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, as_inputs(x))  # type: ignore[no-any-return]


def _run(model: nn.Module, inputs: Inputs, owner: str) -> None:
    args, kwargs = inputs
    try:
        model(*args, **kwargs)
    except TypeError as error:
        try:
            inspect.signature(unwrap(model).forward).bind(*args, **kwargs)
        except TypeError as misfit:
            raise TypeError(
                f"{owner}: {type(model).__name__} does not take what the loader yields: {misfit}; of a batch (x, ...) "
                f"it gets x, which holds several inputs as a tuple or dict: ((a, b), labels)"
            ) from error
        raise


def _checked_masks(gates: Mapping[str, Gate], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(masks, Mapping):
        raise TypeError(f"freeze: masks must be a dict of gate path -> bool tensor, got {type(masks).__name__}")
    missing, unknown = gates.keys() - masks.keys(), masks.keys() - gates.keys()
    if missing or unknown:
        raise ValueError(f"freeze: masks must name every gate; missing {sorted(missing)}, unknown {sorted(unknown)}")
    checked = {}
    for name, gate in gates.items():
        mask = masks[name]
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"freeze: the mask of {name!r} must be a bool tensor, got {kind}")
        if mask.shape != (gate.num_gates,):
            raise ValueError(
                f"freeze: the mask of {name!r} must have shape ({gate.num_gates},), got {tuple(mask.shape)}"
            )
        checked[name] = mask.detach().clone().to(gate.running_open_rate.device)
    return checked


@torch.no_grad()
def _vote(
    model: nn.Module, gates: Mapping[str, Gate], loader: Iterable[Any]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Open rate of every gate over the loader, and the number of samples that reached it.

    A channel gate inside a block that a sample skips does not see that sample; one that no sample
    reached keeps the open rate of its training.
    """
    votes = {name: torch.zeros_like(gate.running_open_rate, dtype=torch.float64) for name, gate in gates.items()}
    counts = dict.fromkeys(gates, 0)
    model, seen = unwrap(model), 0
    device = next(iter(votes.values())).device

    def count(name: str) -> Any:
        def hook(gate: Gate, args: Any, output: Tensor) -> None:
            # A NaN logit is not above 0 and would pass for a closed gate.
            sane = gate.logits is None or bool(gate.logits.isfinite().all())
            votes[name] += output.sum(dim=0, dtype=torch.float64) if sane else torch.nan
            counts[name] += output.shape[0]

        return hook

    hooks = [gate.register_forward_hook(count(name)) for name, gate in gates.items()]
    try:
        # Eager: compiled branches compute all samples, and those that skip one have no vote inside it.
        with eval_mode(model), torch.compiler.set_stance("force_eager"):
            for batch in _require_batches(loader, "freeze"):
                inputs = _inputs(batch, "freeze", device)
                _run(model, inputs, "freeze")
                seen += len(tensors_of(inputs)[0])
    finally:
        for hook in hooks:
            hook.remove()
    votes, counts = sum_over_ranks(votes, counts)
    if seen == 0 and not any(counts.values()):
        raise ValueError("freeze: the loader yielded no samples")
    rates = {
        name: vote / counts[name] if counts[name] else gates[name].running_open_rate.double()
        for name, vote in votes.items()
    }
    return rates, counts


def _require_finite(rates: Mapping[str, Tensor]) -> None:
    broken = [name for name, rate in rates.items() if not rate.isfinite().all()]
    if broken:
        raise ValueError(f"freeze: gate {broken[0]!r} has logits or open rates that are not finite numbers")


def _consensus(masks: Mapping[str, Tensor], rates: Mapping[str, Tensor], counts: Mapping[str, int]) -> Consensus:
    """Agreement counts the decisions that were made: those of gates that samples reached."""
    shares = {n: torch.where(masks[n], rates[n], 1 - rates[n]).double() for n in rates if counts[n]}
    agreeing = sum(float(share.sum()) * counts[name] for name, share in shares.items())
    decisions = sum(share.numel() * counts[name] for name, share in shares.items())
    per_gate = {name: float(share.mean()) for name, share in shares.items()}
    return Consensus(dict(masks), agreeing / decisions if decisions else None, per_gate, dict(rates))


def _warn(consensus: Consensus) -> None:
    low = {name: share for name, share in consensus.gate_agreement.items() if share < AGREEMENT_WARNING}
    if consensus.agreement is not None and (consensus.agreement < AGREEMENT_WARNING or low):
        worst = ", ".join(f"{name} {share:.1%}" for name, share in sorted(low.items(), key=lambda kv: kv[1])[:5])
        warnings.warn(
            f"freeze: the samples agree with the consensus on {consensus.agreement:.2%} of the decisions; "
            f"least on: {worst}",
            stacklevel=4,  # of the caller of freeze, past its decorator
        )
