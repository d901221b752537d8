"""The goals, case by case; docs/performance.md has each with its result."""

from __future__ import annotations

from benchmarks.layers import is_cifar
from benchmarks.networks import VARIANTS, NetworkCase
from gatedconv.report.layers import ConvCase

# How many times faster than the fastest peer, by network and batch.
NETWORK_GOALS = {
    ("resnet56 dense", 1): 1.5,
    ("resnet56 dense", 32): 1.3,
    ("resnet56 mid-50", 1): 2.0,
    ("resnet56 mid-50", 32): 1.4,
    ("resnet56 half the blocks", 1): 2.0,
    ("resnet56 half the blocks", 32): 1.4,
    **{
        (f"{model} {variant}", n): 1.0 for model in ("resnet18", "resnet50") for variant in VARIANTS[:2] for n in (1, 8)
    },
}

# How many times faster than torch.nn.functional.conv2d, by the percentage of open outputs: shapes of networks for
# 32x32 images, from this batch on.
LAYER_GOALS = {50: 1.7, 100: 1.0}
LAYER_GOALS_FROM_BATCH = 8


def goal(case: ConvCase | NetworkCase) -> float | None:
    """The ratio that a case is to reach, None if it has no goal."""
    if isinstance(case, NetworkCase):
        return NETWORK_GOALS.get((case.name, case.batch))
    if not is_cifar(case) or case.batch < LAYER_GOALS_FROM_BATCH or not isinstance(case.open, int):
        return None
    return LAYER_GOALS.get(case.open)
