"""The masked convolution as it is defined: group by group of each sample, in fp64, sharing nothing with gatedconv."""

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
    per_group, rows_per_group = input.shape[1] // groups, weight.shape[0] // groups
    geometry = (stride, padding, dilation)
    size = F.conv2d(input[:1, :1].to("meta"), weight[:1, :1].to("meta"), None, *geometry).shape[2:]
    out = torch.zeros(input.shape[0], weight.shape[0], *size, dtype=torch.float64)
    for n in range(input.shape[0]):
        sample_open = out_open if out_open.dim() == 1 else out_open[n]
        for group in range(groups):
            channels = range(group * per_group, (group + 1) * per_group)
            read = [c for c in channels if in_open is None or in_open[c]]
            rows = [r for r in range(group * rows_per_group, (group + 1) * rows_per_group) if sample_open[r]]
            if not rows:
                continue
            if read:
                kept = weight[rows][:, [c - group * per_group for c in read]].double()
                out[n, rows] = F.conv2d(input[n : n + 1, read].double(), kept, None, *geometry)[0]
            if bias is not None:
                out[n, rows] += bias[rows, None, None].double()
    if residual is not None:
        out = out + residual.double()
    return out.clamp(min=0) if relu else out
