"""The masked convolution as it is defined: output by output, in fp64, sharing nothing with gatedconv."""

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_conv2d_oracle(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_open: Tensor,
    in_open: Tensor | None = None,
    *,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Return the output in fp64; differentiable where no NaN is about."""
    per_group = input.shape[1] // groups
    rows_per_group = weight.shape[0] // groups
    samples = []
    for n in range(input.shape[0]):
        planes = []
        for row in range(weight.shape[0]):
            group = row // rows_per_group
            channels = range(group * per_group, (group + 1) * per_group)
            read = [c for c in channels if in_open is None or in_open[c]]
            taps = [c - group * per_group for c in read]
            # The plane of the right size and, where nothing is read, its value: a convolution with a zero
            # input.
            plane = F.conv2d(
                torch.zeros_like(input[n : n + 1, :1]).double(),
                torch.zeros_like(weight[:1, :1]).double(),
                None,
                stride,
                padding,
                dilation,
            )[0, 0]
            is_open = out_open[row] if out_open.dim() == 1 else out_open[n, row]
            if is_open and read:
                plane = F.conv2d(
                    input[n : n + 1, read].double(),
                    weight[row : row + 1, taps].double(),
                    None,
                    stride,
                    padding,
                    dilation,
                )[0, 0]
            if is_open and bias is not None:
                plane = plane + bias[row].double()
            if residual is not None:
                plane = plane + residual[n, row].double()
            planes.append(plane)
        samples.append(torch.stack(planes))
    out = torch.stack(samples)
    return out.clamp(min=0) if relu else out
