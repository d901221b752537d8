"""Latency of models, interleaved, and of the blocks of a compact network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gatedconv.measure.interleaved import Interleaved, Name, Spread
from gatedconv.measure.macs import count_macs


@torch.inference_mode()
def measure_latency(
    models: Mapping[Name, Callable[[Tensor], object]],
    example_input: Tensor,
    *,
    rounds: int = 21,
    warmup: int = 3,
    min_ms: float = 5.0,
) -> dict[Name, Spread]:
    """Time several models on one input: round 1 of each, then round 2 of each, and so on.

    Args:
        models: name -> callable; networks must be in eval mode and on the input's device.
        example_input: (N, C, H, W), the batch to run.
        rounds: measurements per model.
        warmup: calls of each model before any is timed.
        min_ms: minimum duration of one measurement; faster models are called several times in it.

    Returns:
        name -> ms of one call.

    Raises:
        ValueError: no models, no warm-up, or no round.
    """
    if rounds < 1:
        raise ValueError(f"measure_latency: expected at least one of rounds, got {rounds}")
    calls = {name: partial(model, example_input) for name, model in models.items()}
    synchronize = partial(torch.cuda.synchronize, example_input.device) if example_input.is_cuda else None
    timing = Interleaved(calls, sample_ms=min_ms, warmup=warmup, lead_in=0, wait=False, synchronize=synchronize)
    for _ in range(rounds):
        timing.round()
    return {name: timing.spread(name) for name in models}


@torch.inference_mode()
def block_figures(
    net: nn.Module, masks: Mapping[str, Tensor], example_input: Tensor, *, rounds: int = 9
) -> list[dict[str, Any]]:
    """Size, MACs and time of every gated block of a compact network.

    Args:
        net: the compact network, in eval mode; its blocks have the module paths of the gated network.
        masks: gate path -> bool (num_gates,), the consensus.
        example_input: (1, C, H, W).
        rounds: interleaved measurements of each block; 0 measures no times.

    Returns:
        One dict for each block, in order: `block`, its path; `open` and `channels`, of its channel gate, None
        without one; `runs`, whether its branch exists; `macs` of the block per image; `ms`, the median time of one
        call in PyTorch's eager mode, None where it was not measured.
    """
    paths = dict.fromkeys(gate.rpartition(".")[0] for gate in masks)
    present = {path: found for path in paths if (found := _submodule(net, path)) is not None}
    inputs: dict[str, Tensor] = {}

    def keep(path: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs.setdefault(path, arguments[0].clone())

    hooks = [found.register_forward_pre_hook(partial(keep, path)) for path, found in present.items()]
    try:
        net(example_input)
    finally:
        for hook in hooks:
            hook.remove()
    calls = {path: partial(_call, present[path], x) for path, x in inputs.items()}
    times = measure_latency(calls, example_input, rounds=rounds, min_ms=1.0) if rounds and calls else {}
    return [_figures(path, masks, present.get(path), inputs.get(path), times.get(path)) for path in paths]


def _figures(
    path: str, masks: Mapping[str, Tensor], block: nn.Module | None, x: Tensor | None, time: Spread | None
) -> dict[str, Any]:
    of_block = [mask for gate, mask in masks.items() if gate.rpartition(".")[0] == path]
    channels = next((mask for mask in of_block if mask.numel() > 1), None)
    closed = any(not mask.any() for mask in of_block)
    return {
        "block": path,
        "open": None if channels is None else 0 if closed else int(channels.sum()),
        "channels": None if channels is None else channels.numel(),
        "runs": not closed,
        "macs": 0 if block is None or x is None or isinstance(block, nn.Identity) else count_macs(block, x),
        "ms": None if time is None else round(time.median, 5),
    }


def _call(block: nn.Module, x: Tensor, unused: Tensor) -> Any:
    return block(x)


def _submodule(net: nn.Module, path: str) -> nn.Module | None:
    try:
        return net.get_submodule(path)
    except AttributeError:
        return None
