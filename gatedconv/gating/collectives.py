"""Collectives of distributed training: open rates of the global batch, the norm over it, votes, masks.

Every function except `world_size` and `synchronized_norm` has to be called by all ranks. With a single process none of
them communicates.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def world_size() -> int:
    """Number of processes that train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def global_mean(values: Tensor, count: int) -> Tensor:
    """Mean of ``values`` over all ranks, each weighed by its ``count`` of samples; one collective, differentiable.

    Its gradient is made for DistributedDataParallel, which averages over ranks: the mean of the ranks'
    gradients times the share count * ranks / (sum of counts).

    Args:
        values: (K,), means over this rank's samples.
        count: the number of those samples; ranks may differ.

    Returns:
        (K,), the same on every rank.
    """
    mean: Tensor = _GlobalMean.apply(values, count)
    return mean


class _GlobalMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, values: Tensor, count: int) -> Tensor:
        # The count travels with the values: a second collective would cost as much again.
        total = torch.cat([values * count, values.new_full((1,), count)])
        dist.all_reduce(total)
        ctx.share = count * dist.get_world_size() / total[-1]  # type: ignore[attr-defined]
        return total[:-1] / total[-1]

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        share: Tensor = ctx.share  # type: ignore[attr-defined]
        return total * (share / dist.get_world_size()), None


class SynchronizedNorm(nn.BatchNorm1d):
    """BatchNorm1d whose statistics in training are those of the global batch: one collective, and one backward.

    For the hidden layer of a gate, on CPUs as on GPUs. Ranks may hold different numbers of samples. In eval, and with a
    single process, it is BatchNorm1d. Sums are of fp64: E[x^2] - E[x]^2 in fp32 leaves nothing of a variance that is
    small against the mean.

    Shape: (N, C) -> (N, C).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize: x (N, C) -> (N, C)."""
        if world_size() == 1 and self.training and len(x) == 1 and self.running_mean is not None:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        if not self.training or world_size() == 1:
            return super().forward(x)
        count, features = x.shape
        exact = x.double()
        inverse = exact.new_full((1,), 1 / count)  # its mean over all samples is ranks / (sum of counts)
        means = global_mean(torch.cat([exact.mean(dim=0), (exact * exact).mean(dim=0), inverse]), count)
        mean, square, inverse = means.split([features, features, 1])
        var = (square - mean * mean).clamp_min(0)
        self._track(mean.detach(), var.detach(), world_size() / inverse.detach())
        normed = ((exact - mean) * torch.rsqrt(var + self.eps)).to(x.dtype)
        return normed if self.weight is None else normed * self.weight + self.bias

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, total: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        self.running_var.lerp_((var * (total / (total - 1))).to(self.running_var), momentum)


def synchronized_norm(norm: nn.BatchNorm1d) -> SynchronizedNorm:
    """A norm over all processes that shares a norm's parameters, buffers and mode."""
    twin = SynchronizedNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    twin._parameters, twin._buffers, twin.training = norm._parameters, norm._buffers, norm.training
    return twin


def sum_over_ranks(sums: Mapping[str, Tensor], counts: Mapping[str, int]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Sum over all ranks what each summed over its samples, such as votes, and the numbers of samples.

    Args:
        sums: gate path -> (num_gates,).
        counts: gate path -> number of samples.
    """
    if world_size() == 1 or not sums:
        return dict(sums), dict(counts)
    device = next(iter(sums.values())).device
    sizes = torch.tensor([float(counts[name]) for name in sums], dtype=torch.float64, device=device)
    joined = torch.cat([*(part.double() for part in sums.values()), sizes])
    dist.all_reduce(joined)
    *summed, sizes = joined.split([*(part.numel() for part in sums.values()), len(sums)])
    total = {name: int(count) for name, count in zip(sums, sizes.tolist(), strict=True)}
    return dict(zip(sums, summed, strict=True)), total


def mean_over_ranks(rates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mean over all ranks of running open rates (num_gates,)."""
    if world_size() == 1 or not rates:
        return dict(rates)
    joined = torch.cat(list(rates.values()))
    dist.all_reduce(joined)
    sizes = [rate.numel() for rate in rates.values()]
    return dict(zip(rates, (joined / world_size()).split(sizes), strict=True))


def require_same_masks(masks: Mapping[str, Tensor], owner: str) -> None:
    """Check that every rank holds the same masks.

    Args:
        masks: gate path -> bool (num_gates,), in the same order on every rank.
        owner: begins the message.

    Raises:
        ValueError: on every rank, naming the gates that differ.
    """
    if world_size() == 1 or not masks:
        return
    joined = torch.cat([mask.to(torch.int32) for mask in masks.values()])
    total = joined.clone()
    dist.all_reduce(total)
    mixed = (total != 0) & (total != world_size())
    parts = mixed.split([mask.numel() for mask in masks.values()])
    differing = [name for name, part in zip(masks, parts, strict=True) if part.any()]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError(
            f"{owner}: expected the same masks on all {world_size()} ranks, found different ones for gate "
            f"{', '.join(repr(name) for name in differing[:3])}{more}"
        )
