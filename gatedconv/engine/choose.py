"""Chooses how a 3x3 convolution with stride 1 is computed: directly or by Winograd's algorithms, by estimated work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass

from gatedconv.engine.layers import Layer, map_size

ALGORITHMS = {"conv": 1, "winograd2": 2, "winograd4": 4}  # and the side of the tile of outputs that each computes

Choose = Callable[[Layer, int], str]
"""(a convolution for which `algorithms` has several, images) -> one of them."""

_TOGETHER = 8  # images that a plan takes together at most (csrc/cpu/plan.cpp)


@dataclass(frozen=True)
class Rates:
    """How long each kind of work takes, in multiply-adds of a direct convolution.

    Attributes:
        direct: A multiply-add of a direct convolution.
        product: A multiply-add in Winograd's products.
        transform2: An element that F(2x2) transforms, of its input or of its output.
        transform4: The same of F(4x4).
        weight: A weight, read once for all images that are computed together.
    """

    direct: float
    product: float
    transform2: float
    transform4: float
    weight: float


# Fitted to benchmarks/results/kernels-xeon-*.json (`python -m benchmarks.kernels --fit`), times with AVX2 and with
# AVX-512: the chosen algorithm is within 5 % of the best one in 110 of 112 cases, and on an EPYC in 52 of 56.
RATES = Rates(direct=1.0, product=1.21, transform2=3.91, transform4=11.4, weight=7.11)


@dataclass(frozen=True)
class Work:
    """A 3x3 convolution with stride and padding 1, (N, C, H, W) -> (N, K, H, W)."""

    batch: int
    in_channels: int
    out_channels: int
    height: int
    width: int

    def amounts(self, algorithm: str) -> tuple[float, float, float, float, float]:
        """The work of an image, of each kind of `Rates`, in their order."""
        tile = ALGORITHMS[algorithm]
        points = 9 if tile == 1 else (tile + 2) ** 2
        tiles = -(-self.height // tile) * -(-self.width // tile)
        weights = points * self.in_channels * self.out_channels
        moved = tiles * points * (self.in_channels + self.out_channels)
        return (
            tiles * weights * (tile == 1),
            tiles * weights * (tile > 1),
            moved * (tile == 2),
            moved * (tile == 4),
            weights / min(max(self.batch, 1), _TOGETHER),
        )

    def estimate(self, algorithm: str, rates: Rates) -> float:
        """The time of an image, in multiply-adds of a direct convolution."""
        return sum(a * p for a, p in zip(self.amounts(algorithm), astuple(rates), strict=True))


def algorithms(layer: Layer) -> tuple[str, ...]:
    """The algorithms by which a plan can compute a convolution; the first is always possible."""
    assert layer.weight is not None
    plain = layer.groups == 1 and layer.stride == (1, 1) and layer.dilation == (1, 1)
    # With fewer channels the transforms cost more than the products save.
    square = layer.kernel == (3, 3) and layer.padding == (1, 1, 1, 1) and layer.weight.shape[1] >= 5
    return tuple(ALGORITHMS) if plain and square else ("conv",)


def work_of(layer: Layer, batch: int) -> Work:
    """The size of a convolution for `batch` images of the example's size."""
    assert layer.weight is not None
    out_channels, in_channels = layer.weight.shape[:2]
    return Work(batch, in_channels, out_channels, *map_size(layer.inputs[0])[1:])


def choose_estimated(layer: Layer, batch: int) -> str:
    """The algorithm with the least estimated time."""
    work = work_of(layer, batch)
    return min(algorithms(layer), key=lambda algorithm: work.estimate(algorithm, RATES))
