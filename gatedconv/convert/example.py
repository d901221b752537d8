"""The example input of ``gate_model`` and ``compact``: what it may be, and the run that is recorded on it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gatedconv.convert.record import Record, SharedWithOriginal, open_up, record
from gatedconv.convert.verify import as_inputs, tensors_of

_DIMENSIONS = (2, 4, 5)  # vectors, images, clips


def require_example(example_input: Any, owner: str) -> Any:
    """The example; a tuple that holds one batch of images is unwrapped, so that the result can keep its size.

    Raises:
        TypeError: it is neither images, clips or vectors nor a structure with tensors; names ``owner``.
    """
    if isinstance(example_input, (tuple, list, Mapping)):
        if not tensors_of(as_inputs(example_input)):
            raise TypeError(f"{owner}: example_input must be a tensor or hold tensors, got {example_input!r}")
        for leaf in tree_leaves(as_inputs(example_input)):
            if not isinstance(leaf, Tensor) and tensors_of(leaf):
                raise TypeError(
                    f"{owner}: example_input must hold its tensors in tuples, lists and dicts, got one in a "
                    f"{type(leaf).__name__}, where it cannot be varied to verify the result"
                )
        only = example_input[0] if not isinstance(example_input, Mapping) and len(example_input) == 1 else None
        images = isinstance(only, Tensor) and only.is_floating_point() and only.dim() in _DIMENSIONS
        if not images:
            return example_input
        example_input = only
    if not isinstance(example_input, Tensor) or example_input.dim() not in _DIMENSIONS:
        kind = tuple(example_input.shape) if isinstance(example_input, Tensor) else type(example_input).__name__
        raise TypeError(
            f"{owner}: example_input must be a tensor (N, C, H, W), a tuple or a dict of inputs, got {kind}"
        )
    if not example_input.is_floating_point() or example_input.is_meta:
        kind = f"{example_input.dtype} on {example_input.device}"
        raise TypeError(f"{owner}: example_input must be of a floating-point type and hold data, got {kind}")
    return example_input


def record_example(model: nn.Module, example_input: Any, owner: str, original: nn.Module | None = None) -> Record:
    """The record of two images like the example, or of the example itself where the model takes no others.

    Args:
        model: runs, which may change its state.
        example_input: as of ``gate_model``.
        owner: the name that messages begin with.
        original: of which the model is a copy.

    Raises:
        ValueError: the model does not run on it, returns no tensors, or uses layers of the original.
    """
    try:
        found = _recorded(model, example_input, owner, original)
    except SharedWithOriginal as error:
        raise ValueError(f"{owner}: {error}") from None
    leaves = tree_leaves(open_up(found.returned))
    if any(isinstance(leaf, Iterator) for leaf in leaves):
        raise ValueError(f"{owner}: {type(model).__name__} returns a generator, which computes after its forward")
    if not found.outputs:
        kind = type(found.returned).__name__
        raise ValueError(
            f"{owner}: expected a model that returns tensors, in tuples, lists, dicts or objects; "
            f"{type(model).__name__} returns a {kind} without any"
        )
    return found


def _recorded(model: nn.Module, example_input: Any, owner: str, original: nn.Module | None) -> Record:
    args, kwargs = as_inputs(example_input)
    if isinstance(example_input, Tensor) and len(example_input) < 2:
        image = example_input if len(example_input) else example_input.new_zeros(1, *example_input.shape[1:])
        try:
            return record(model, (torch.cat([image, image]),), original=original)
        except SharedWithOriginal:
            raise
        except Exception:  # a model for single images
            pass
    try:
        return record(model, args, kwargs, original=original)
    except SharedWithOriginal:
        raise
    except Exception as error:  # whatever the model's code raises
        failure = does_not_run(model, (args, kwargs), error, owner)
        hint = "" if original is None else foreign_hooks(model, original)
        raise ValueError(f"{failure}{hint}") from error


def foreign_hooks(copy: nn.Module, original: nn.Module) -> str:
    """A hint about the first hook of a copy that still holds modules of the original; "" where there is none."""
    others = set(original.modules())
    for path, module in copy.named_modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            held = inspect.getclosurevars(hook).nonlocals.values() if inspect.isfunction(hook) else ()
            if any(isinstance(item, nn.Module) and item in others for item in held):
                return (
                    f" (a hook of {path or 'the model'} is a function that holds the model, which a copy shares; a "
                    "bound method is copied with it)"
                )
    return ""


def does_not_run(model: nn.Module, inputs: Any, error: Exception, owner: str) -> ValueError:
    """The error to raise for a model whose code raised ``error``."""
    shapes = ", ".join(f"{tuple(t.shape)}, {t.dtype}, on {t.device}" for t in tensors_of(inputs))
    why = f"{type(error).__name__}: {error}"
    return ValueError(f"{owner}: {type(model).__name__} does not run on example_input ({shapes}): {why}")
