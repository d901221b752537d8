"""Weights of a masked convolution that stay packed between calls."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from gatedconv.ops import _masked_conv2d_cuda, _masked_conv2d_native


class PackedConv:
    """Keeps what `masked_conv2d` packs, for one convolution whose masks rarely change.

    Only a cache: the operator compares what was packed with the weights and masks of every call, bit by
    bit, and packs anew for that call where they differ, so a result never depends on what is kept here. What
    is kept is renewed when a tensor is another one or was changed in place; a change that PyTorch does not
    count (through ``.data``, or of an inference tensor) costs the packing at every call until then.

    On a GPU a comparison would synchronize, so there what is kept is valid for the same tensors, unchanged since
    packing: a change through ``.data``, or by a CUDA graph that is replayed (a training step, for one), is not seen
    before `clear`; `gatedconv.Conv2d` clears when it goes to training or eval. Of inference tensors, and inside of a
    graph that is being captured, nothing is kept.

    It belongs to a process and to the memory of its tensors: copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        self._kept: tuple[tuple[object, ...], Tensor] | None = None
        self._everything: Tensor | None = None

    def clear(self) -> None:
        """Forget everything."""
        self._kept = self._everything = None

    def everything(self, channels: int, device: torch.device) -> Tensor:
        """Return a mask (channels,) with everything open, the same tensor at every call."""
        mask = self._everything
        if mask is None or mask.shape[0] != channels or mask.device != device:
            # Not an inference tensor, for which nothing would be kept.
            with torch.inference_mode(False):
                self._everything = mask = torch.ones(channels, dtype=torch.bool, device=device)
        return mask

    def tensor(self, weight: Tensor, out_open: Tensor, in_open: Tensor | None, groups: int) -> Tensor | None:
        """Return the packed weights, packing them first where they are not those of the last call.

        Args:
            weight: (C_out, C_in / groups, KH, KW).
            out_open: bool (C_out,), or (N, C_out), for which nothing is kept.
            in_open: bool (C_in,), or (N, C_in), for which nothing is kept, or None.
            groups: Number of groups.

        Returns:
            A vector as `gatedconv::masked_conv2d_pack` makes it, or None where nothing can be kept.
        """
        masks = (out_open,) if in_open is None else (out_open, in_open)
        if type(weight) not in (Tensor, nn.Parameter) or any(mask.dim() != 1 for mask in masks):
            return None
        if torch._C._are_functorch_transforms_active():
            return None
        key: tuple[object, ...]
        if _on_gpu(weight):
            tensors = (weight, *masks)
            if any(tensor.is_inference() for tensor in tensors) or torch.cuda.is_current_stream_capturing():
                return None
            key = _device_key(tensors, groups)
        elif weight.device.type == "cpu" and weight.dtype == torch.float32:
            key = (*_state(weight), *_state(out_open), *((0, 0) if in_open is None else _state(in_open)), groups)
        else:
            return None
        kept = self._kept
        if kept is None or kept[0] != key:
            packed = _masked_conv2d_native.pack(weight, out_open, in_open, groups)
            # One assignment, so that threads see either state as a whole.
            self._kept = kept = (key, packed)
        return kept[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedConv:
        return PackedConv()

    def __reduce__(self) -> tuple[type[PackedConv], tuple[()]]:
        return PackedConv, ()


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


class _Same:
    """A tensor as a part of a key: equal to itself alone, and to nothing once it is gone."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = weakref.ref(tensor)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and (own := self.tensor()) is not None and own is other.tensor()

    __hash__ = None  # type: ignore[assignment]


def _device_key(tensors: tuple[Tensor, ...], groups: int) -> tuple[object, ...]:
    """The key of weights packed on a GPU.

    The stream is part of it, since another one may read before the packing has finished.
    """
    states = [(_Same(t), *_state(t), t.shape, t.stride(), t.dtype) for t in tensors]
    return (
        *states,
        groups,
        _masked_conv2d_cuda.allows_tf32(),
        torch.cuda.current_stream(tensors[0].device).cuda_stream,
    )


def _state(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version
