"""The example input of ``gate_model`` and ``compact``: what it may be, and the run that is recorded on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gatedconv.convert.record import Record, record
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


def record_example(model: nn.Module, example_input: Any, owner: str) -> Record:
    """The record of two images like the example, or of the example itself where the model takes no others.

    Raises:
        ValueError: the model does not run on it.
    """
    args, kwargs = as_inputs(example_input)
    if isinstance(example_input, Tensor) and len(example_input) < 2:
        image = example_input if len(example_input) else example_input.new_zeros(1, *example_input.shape[1:])
        try:
            return record(model, (torch.cat([image, image]),))
        except Exception:  # a model for single images
            pass
    try:
        return record(model, args, kwargs)
    except Exception as error:  # whatever the model's code raises
        raise does_not_run(model, (args, kwargs), error, owner) from error


def does_not_run(model: nn.Module, inputs: Any, error: Exception, owner: str) -> ValueError:
    """The error to raise for a model whose code raised ``error``."""
    shapes = ", ".join(f"{tuple(t.shape)}, {t.dtype}, on {t.device}" for t in tensors_of(inputs))
    why = f"{type(error).__name__}: {error}"
    return ValueError(f"{owner}: {type(model).__name__} does not run on example_input ({shapes}): {why}")
