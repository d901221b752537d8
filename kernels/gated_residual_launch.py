"""Launches the kernels of a block's end: tile sizes, grids, and the buffers that they fill."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .gated_residual import finish_statistics, residual_forward, statistics
from .gated_residual_backward import finish_reduce, residual_backward, residual_reduce
from .launch import ceil_div, gradient_like, map_tiles, on_device, positions, power_of_two

GROUPS = 128  # programs that share the batch of a reduction: about one per multiprocessor of a large GPU
CHANNEL_TILE = 32  # of the kernels that finish a reduction
ROW_TILE = 32


class Statistics(NamedTuple):
    """Of x: stat (3, C), mean, 1 / sqrt(var + eps), unbiased variance; pooled (N, C); normed (N, C), pooled BN(x)."""

    stat: Tensor
    pooled: Tensor
    normed: Tensor | None


class Grid(NamedTuple):
    """How a map is shared out."""

    groups: int
    per_group: int
    channel_tiles: int
    blocks: dict[str, int]


def normalise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: tuple[Tensor, Tensor, Tensor] | None,
    *,
    eps: float,
    momentum: float,
    normed: bool,
) -> Statistics:
    """Statistics of x (N, C, H, W) over N, H, W; running mean, variance and int64 count move in place."""
    batch, channels = x.shape[:2]
    pixels = x.shape[2] * x.shape[3]
    new = {"device": x.device, "dtype": torch.float32}
    grid = _grid(x)
    part = torch.empty(grid.groups, 2, channels, **new)
    out = Statistics(
        torch.empty(3, channels, **new),
        torch.empty(batch, channels, **new),
        torch.empty(batch, channels, **new) if normed else None,
    )
    with on_device(x):
        x, strides = positions(x)
        statistics[(grid.groups, grid.channel_tiles)](
            part, out.pooled, x, *strides, batch, channels, pixels, grid.per_group, **grid.blocks
        )
        finish_statistics[(ceil_div(channels, CHANNEL_TILE),)](
            out.stat,
            out.normed,
            part,
            out.pooled,
            weight,
            bias,
            *(running or (None, None, None)),
            batch,
            channels,
            pixels,
            grid.groups,
            grid.per_group,
            eps,
            momentum,
            NORMED=normed,
            UPDATE=running is not None,
            BLOCK_G=power_of_two(grid.groups),
            BLOCK_C=CHANNEL_TILE,
            BLOCK_N=ROW_TILE,
        )
    return out


def forward(
    x: Tensor,
    shortcut: Tensor,
    stat: Tensor,
    weight: Tensor,
    bias: Tensor,
    layer: Tensor | None,
    channel: Tensor | None,
    *,
    pool: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return out = ReLU(shortcut + layer * channel * BN(x)) in the layout of x, and its mean (N, C)."""
    batch, channels = x.shape[:2]
    x, x_strides = positions(x)
    shortcut, shortcut_strides = positions(shortcut)
    out = gradient_like(x, torch.promote_types(x.dtype, shortcut.dtype))
    pooled = torch.empty(batch, channels, device=x.device, dtype=torch.float32) if pool else None
    grid = _grid(x)
    with on_device(x):
        residual_forward[(batch, grid.channel_tiles)](
            out,
            *positions(out)[1],
            pooled,
            x,
            *x_strides,
            shortcut,
            *shortcut_strides,
            stat,
            weight,
            bias,
            layer,
            channel,
            channels,
            x.shape[2] * x.shape[3],
            HAS_LAYER=layer is not None,
            HAS_CHANNEL=channel is not None,
            POOL=pool,
            **grid.blocks,
        )
    return out, pooled


class Backward:
    """The way back in two steps, between which a channel gate's own backward can run.

    Attributes:
        d_channel: (N, C), gradient of the channel gate; None without one.
    """

    def __init__(
        self,
        d_out: Tensor | None,
        d_pooled: Tensor | None,
        out: Tensor,
        x: Tensor,
        stat: Tensor,
        weight: Tensor,
        bias: Tensor,
        layer: Tensor | None,
        channel: Tensor | None,
    ) -> None:
        self.x, x_strides = positions(x)
        self.stat, self.weight, self.layer, self.channel = stat, weight, layer, channel
        batch, channels = x.shape[:2]
        self.sizes = (batch, channels, x.shape[2] * x.shape[3])
        self.grid = _grid(self.x)
        new: dict[str, Any] = {"device": x.device, "dtype": torch.float32}
        grad_strides: tuple[int, int, int] = (0, 0, 0)
        if d_out is not None:
            d_out, grad_strides = positions(d_out)
        d_pooled = None if d_pooled is None else d_pooled.contiguous()
        self.incoming = (d_out, *grad_strides, d_pooled, out, *positions(out)[1], self.x, *x_strides)
        self.flags = {
            "HAS_GRAD": d_out is not None,
            "HAS_POOLED": d_pooled is not None,
            "HAS_LAYER": layer is not None,
            "HAS_CHANNEL": channel is not None,
        }
        self.part = torch.empty(self.grid.groups, 2, channels, **new)
        self.layer_part = None if layer is None else torch.empty(batch, self.grid.channel_tiles, **new)
        self.d_channel = None if channel is None else torch.empty(batch, channels, **new)
        with on_device(x):
            residual_reduce[(self.grid.groups, self.grid.channel_tiles)](
                self.part,
                self.layer_part,
                self.d_channel,
                *self.incoming,
                stat,
                weight,
                bias,
                layer,
                channel,
                *self.sizes,
                self.grid.per_group,
                **self.flags,
                **self.grid.blocks,
            )

    def finish(
        self, pooled: Tensor, d_normed: Tensor | None, shortcut: Tensor, need_shortcut: bool
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
        """Gradients of x, shortcut, weight, bias, layer; d_normed (N, C) is that of the pooled BN(x).

        ``shortcut`` gives the shape, layout and dtype of its gradient.
        """
        batch, channels, pixels = self.sizes
        dx = gradient_like(self.x, self.x.dtype)
        d_shortcut, strides = None, (0, 0, 0)
        if need_shortcut:
            d_shortcut, strides = positions(torch.empty_like(shortcut, device=self.x.device))  # its own: may be a copy
        d_weight, d_bias = torch.empty_like(self.weight), torch.empty_like(self.weight)
        d_layer = None if self.layer is None else torch.empty_like(self.layer)
        with on_device(dx):
            finish_reduce[(ceil_div(channels, CHANNEL_TILE),)](
                d_bias,
                d_weight,
                d_layer,
                self.part,
                self.layer_part,
                d_normed,
                pooled,
                self.stat,
                batch,
                channels,
                self.grid.groups,
                self.grid.channel_tiles,
                HAS_LAYER=d_layer is not None,
                HAS_NORMED=d_normed is not None,
                BLOCK_G=power_of_two(self.grid.groups),
                BLOCK_C=CHANNEL_TILE,
                BLOCK_N=ROW_TILE,
                BLOCK_T=power_of_two(self.grid.channel_tiles),
            )
            residual_backward[(batch, self.grid.channel_tiles)](
                dx,
                *positions(dx)[1],
                d_shortcut,
                *strides,
                *self.incoming,
                self.stat,
                self.weight,
                self.layer,
                self.channel,
                d_bias,
                d_weight,
                d_normed,
                batch,
                channels,
                pixels,
                **self.flags,
                HAS_NORMED=d_normed is not None,
                NEED_SHORTCUT=need_shortcut,
                **self.grid.blocks,
            )
        return dx, d_shortcut, d_weight, d_bias, d_layer


def _grid(x: Tensor) -> Grid:
    batch = x.shape[0]
    per_group = ceil_div(batch, GROUPS)
    tiles, blocks = map_tiles(x)
    return Grid(ceil_div(batch, per_group), per_group, tiles, blocks)
