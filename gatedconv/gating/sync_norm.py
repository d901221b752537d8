"""BatchNorm over the batches of all processes, for the hidden layer of a gate; on CPUs as on GPUs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatedconv.gating.collectives import global_mean, world_size


class SynchronizedNorm(nn.BatchNorm1d):
    """BatchNorm1d whose statistics in training are those of the global batch: one collective, and one backward.

    Ranks may hold different numbers of samples. In eval, and with a single process, it is BatchNorm1d. Sums are of
    fp64: E[x^2] - E[x]^2 in fp32 leaves nothing of a variance that is small against the mean.

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


def synchronized(norm: nn.BatchNorm1d) -> SynchronizedNorm:
    """A norm over all processes that shares a norm's parameters, buffers and mode."""
    twin = SynchronizedNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    twin._parameters, twin._buffers, twin.training = norm._parameters, norm._buffers, norm.training
    return twin
