"""The candidates for one convolution of a plan on a GPU; a tuner takes the fastest that is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gatedconv.engine.cuda.instructions import Instruction, output_size, pad_bias, pad_weight, padded
from gatedconv.ops import _masked_conv2d_cuda

# (source map, residual map or None) -> target map
Candidate = Callable[[Tensor, Tensor | None], Tensor]

_ACTS: dict[str | None, Callable[[Tensor], Tensor]] = {None: lambda x: x, "relu": torch.relu_, "relu6": F.relu6}
_ACT_NUMBERS = {None: 0, "relu": 1, "relu6": 2}


def activate(x: Tensor, act: str | None) -> Tensor:
    """Apply the activation, in place where that is possible; x belongs to the caller."""
    return _ACTS[act](x)


def conv_candidates(
    one: Instruction, dtype: torch.dtype, device: torch.device, mode: str
) -> dict[str, Callable[[], Candidate]]:
    """Return the candidates of an instruction by name, the safest first; what they keep is packed when one is built.

    Args:
        one: A "conv".
        dtype: Of maps and weights.
        device: Where they are.
        mode: As `_masked_conv2d_cuda.kernels_mode` returns it.
    """
    candidates: dict[str, Callable[[], Candidate]] = {"cudnn": lambda: _CompactConv(one, dtype, device)}
    symmetric = one.padding[:2] == one.padding[2:]
    plain = one.groups == 1 and one.in_index is None and one.out_index is None and symmetric
    if device.type == "cuda" and plain and one.act == "relu":
        candidates["cudnn fused"] = lambda: _FusedConv(one, dtype, device)
    probe = torch.empty(0, dtype=dtype, device=device)
    if mode != "off" and _masked_conv2d_cuda.supports(probe, one.kernel, one.dilation, one.groups):
        for tile in _masked_conv2d_cuda.TILES:
            if _worth_trying(one, tile):
                candidates[f"gatedconv {tile[0]}x{tile[1]}"] = partial(_TiledConv, one, dtype, device, tile)
    return candidates


def _worth_trying(one: Instruction, tile: tuple[int, int]) -> bool:
    """Tiles much wider than the outputs only compute zeros; the narrowest that holds them all is the widest tried."""
    columns = len(one.out_index) if one.out_index is not None else one.channels[1]
    return tile[1] == 1 or 8 * tile[1] < 2 * columns


class _CompactConv:
    """PyTorch's convolution of the open channels, then what is left to do, one kernel each."""

    def __init__(self, one: Instruction, dtype: torch.dtype, device: torch.device) -> None:
        assert one.weight is not None
        self.one = one
        grouped = one.groups > 1
        weight = one.weight if grouped else pad_weight(one, dtype)
        bias = pad_bias(one, dtype)[: weight.shape[0]]
        self.weight = weight.to(device, dtype).contiguous(memory_format=torch.channels_last)
        self.bias = bias.to(device, dtype)
        self.inputs = _index(one.in_index, device)
        self.outputs = _index(one.out_index, device)
        self.target = padded(one.channels[1], dtype)

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        one = self.one
        if one.groups > 1:
            x = x[:, : one.channels[0]]
        elif self.inputs is not None:
            x = x.index_select(1, self.inputs)
        top, left, bottom, right = one.padding
        if (top, left) != (bottom, right):
            x, (top, left) = F.pad(x, (left, right, top, bottom)), (0, 0)
        out = F.conv2d(x, self.weight, self.bias, one.stride, (top, left), one.dilation, one.groups)
        if self.outputs is not None:
            assert residual is not None
            out = residual.index_add(1, self.outputs, out)
        else:
            if out.shape[1] != self.target:
                out = F.pad(out, (0, 0, 0, 0, 0, self.target - out.shape[1]))
            out = out if residual is None else out.add_(residual)
        return activate(out, one.act).contiguous(memory_format=torch.channels_last)


class _FusedConv(_CompactConv):
    """cuDNN's convolution with bias, residual and ReLU in one call."""

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        one = self.one
        geometry = (one.stride, one.padding[:2], one.dilation, 1)
        if residual is None:
            return torch.ops.aten.cudnn_convolution_relu(x, self.weight, self.bias, *geometry)  # type: ignore[no-any-return]
        return torch.ops.aten.cudnn_convolution_add_relu(  # type: ignore[no-any-return]
            x, self.weight, residual, 1.0, self.bias, *geometry
        )


class _TiledConv:
    """Our own kernel: gather, convolution, bias, residual, activation and scatter in one launch."""

    def __init__(self, one: Instruction, dtype: torch.dtype, device: torch.device, tile: tuple[int, int]) -> None:
        self.one, self.tile, self.tf32 = one, tile, _masked_conv2d_cuda.allows_tf32()
        self.target = padded(one.channels[1], dtype)
        weight, bias = pad_weight(one, dtype), pad_bias(one, dtype)
        self.inputs = self.outputs = None
        if one.in_index is not None:
            self.inputs = torch.tensor(one.in_index, dtype=torch.int32, device=device)
        if one.out_index is not None:
            weight, bias = (spread(t, one.out_index, self.target) for t in (weight, bias))
            closed = sorted(set(range(self.target)) - set(one.out_index))
            order = [*one.out_index, *closed, len(one.out_index)]
            self.outputs = torch.tensor(order, dtype=torch.int32, device=device)
        self.bias = bias.to(device, torch.float32)
        self.packed = _masked_conv2d_cuda.conv_pack(weight.to(device, dtype), self.inputs, self.tf32)

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        one = self.one
        skip = self.outputs is not None and one.in_place and one.keeps_closed
        if skip and residual is not None:
            output = residual
        else:
            size = output_size(one, x.shape[2:])
            output = torch.empty(
                (x.shape[0], self.target, *size), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
            )
        geometry = [*one.kernel, *one.stride, *one.padding[:2], *one.dilation]
        return _masked_conv2d_cuda.conv_run(
            x,
            self.packed,
            self.bias,
            self.inputs,
            self.outputs,
            residual,
            output,
            geometry,
            _ACT_NUMBERS[one.act],
            skip,
            self.tf32,
            self.tile,
        )


def spread(values: Tensor, index: Sequence[int], size: int) -> Tensor:
    """Put the rows of `values` at `index` of `size` rows, zeros elsewhere."""
    return values.new_zeros((size, *values.shape[1:])).index_copy(
        0, torch.tensor(index, dtype=torch.int64, device="cpu"), values
    )


def _index(index: list[int] | None, device: torch.device) -> Tensor | None:
    return None if index is None else torch.tensor(index, dtype=torch.int64, device=device)
