"""A cut network block by block: what is left of each, what it costs, how long it takes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gatedconv.measure.latency import measure_latency
from gatedconv.measure.macs import count_macs


@torch.inference_mode()
def block_figures(
    net: nn.Module, masks: Mapping[str, Tensor], example_input: Tensor, *, rounds: int = 9
) -> list[dict[str, Any]]:
    """What is left of every gated block of a cut network.

    Args:
        net: the cut network, in eval mode; its blocks have the paths that their gates had them in.
        masks: gate path -> bool (num_gates,), the consensus.
        example_input: (1, C, H, W).
        rounds: measurements of each block, in turns; 0 measures no times.

    Returns:
        One dict for each block, in order: `block`, its path; `open` and `channels`, of its channel gate, None
        without one; `runs`, whether its branch is there at all; `macs` of the whole block per image; `ms`, the
        median time of one call in PyTorch's eager mode, None where it was not measured.
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
    path: str, masks: Mapping[str, Tensor], block: nn.Module | None, x: Tensor | None, time: Any
) -> dict[str, Any]:
    inner = [mask for gate, mask in masks.items() if gate.rpartition(".")[0] == path and mask.numel() > 1]
    shut = any(not mask.any() for gate, mask in masks.items() if gate.rpartition(".")[0] == path)
    kept = block is not None and x is not None and not isinstance(block, nn.Identity)
    return {
        "block": path,
        "open": int(inner[0].sum()) if inner and not shut else 0 if inner else None,
        "channels": inner[0].numel() if inner else None,
        "runs": not shut,
        "macs": count_macs(block, x) if kept and block is not None and x is not None else 0,
        "ms": None if time is None else round(time.median, 5),
    }


def _call(block: nn.Module, x: Tensor, unused: Tensor) -> Any:
    return block(x)


def _submodule(net: nn.Module, path: str) -> nn.Module | None:
    try:
        return net.get_submodule(path)
    except AttributeError:
        return None
