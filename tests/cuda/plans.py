"""Plans of the CUDA engine on the CPU, and a stand-in for its kernel that is written from csrc/library.cpp."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatedconv
from gatedconv.engine.cuda.cuda_plan import CudaPlan
from gatedconv.engine.fuse import fuse
from gatedconv.engine.lower import lower
from gatedconv.engine.partition import find_segments
from gatedconv.engine.plan_writer import lay_out


def make_plan(model: nn.Module, x: Tensor, dtype=torch.float32, device="cpu", **options) -> CudaPlan:
    """The plan of a model that is one segment."""
    plain = copy.deepcopy(model).float().cpu().eval()
    (segment,) = find_segments(lower(plain, x))
    layers = fuse(segment.layers, segment.result)
    laid_out = lay_out(segment.source, layers, segment.result, x.shape[0], lambda *_: "conv")
    return CudaPlan(*laid_out, dtype, torch.device(device), **options)


def vector(dtype: torch.dtype) -> int:
    return 32 // dtype.itemsize


def conv_pack(weight: Tensor, in_index: Tensor | None, tf32: bool) -> Tensor:
    """[chunk][tap][C_out][step], the inputs padded with zeros to whole steps."""
    step = vector(weight.dtype)
    outputs, inputs, height, width = weight.shape
    assert in_index is None or len(in_index) == inputs
    padded = F.pad(weight, (0, 0, 0, 0, 0, -inputs % step))
    return padded.view(outputs, -1, step, height * width).permute(1, 3, 0, 2).reshape(-1).contiguous()


def conv_run(input, packed, bias, in_index, out_index, residual, output, geometry, act, skip_closed, tf32, tile):
    """What the operator promises, in float64."""
    height, width, *rest = geometry
    stride, (top, left), dilation = rest[:2], rest[2:4], rest[4:]
    outputs, step = output.shape[1], vector(input.dtype)
    weight = packed.view(-1, height * width, outputs, step).permute(2, 0, 3, 1).reshape(outputs, -1, height, width)
    x = input if in_index is None else input[:, in_index.long()]
    weight = weight[:, : x.shape[1]]
    room = [
        (output.shape[i + 2] - 1) * stride[i] + dilation[i] * (geometry[i] - 1) + 1 - x.shape[i + 2] - (top, left)[i]
        for i in (0, 1)
    ]
    padded = F.pad(x.double(), (left, room[1], top, room[0]))
    out = F.conv2d(padded, weight.double(), None if bias is None else bias.double(), stride, 0, dilation)
    order = torch.arange(outputs) if out_index is None else out_index[:-1].long()
    count = outputs if out_index is None else int(out_index[-1])
    assert sorted(order.tolist()) == list(range(outputs))
    out[:, order[count:]] = 0
    if residual is not None:
        assert residual.shape == output.shape and residual.stride() == output.stride()
        out = out + residual.double()
    out = out.relu() if act == 1 else out.clamp(0, 6) if act == 2 else out
    written = order[:count] if skip_closed else order
    output[:, written] = out[:, written].to(output.dtype)
    return output


def rms(result: Tensor, exact: Tensor) -> float:
    """Root of the mean square difference: over many logits, what a maximum over few is too noisy to tell."""
    assert result.shape == exact.shape
    return float((result.double() - exact.double()).square().mean().sqrt())


@torch.no_grad()
def clear_images(model: nn.Module, x: Tensor, count: int) -> Tensor:
    """The first images whose gates decide clearly: near zero, rounding would decide."""
    model(x)
    logits = torch.cat([gate.logits.flatten(1) for gate in gatedconv.gates(model).values()], 1)
    chosen = x[logits.abs().amin(1) > 1e-3][:count]
    assert len(chosen) == count
    return chosen


class always:
    """A tuner that takes one candidate wherever there is one."""

    def __init__(self, candidate):
        self.candidate = candidate

    def choose(self, key, candidates, prefer=""):
        return self.candidate if self.candidate in candidates else next(iter(candidates))
