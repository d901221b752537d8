"""The measured convolutions: those of networks for 32x32 and 224x224 images, by batch and share of open outputs."""

from __future__ import annotations

from dataclasses import replace

from gatedconv.bench.conv_case import ConvCase

BATCHES = (1, 8, 32)
OPEN = (0, 25, 50, 75, 100, "odd")
MOST_ROUNDS = 7  # of 234 cases with ten candidates each

CIFAR = tuple(
    ConvCase.parse(text)
    for text in (
        "i3 o16 h32 k3",
        "i16 o16 h32 k3",
        "i16 o32 h32 k3 s2",
        "i32 o32 h16 k3",
        "i32 o64 h16 k3 s2",
        "i64 o64 h8 k3",
    )
)
IMAGENET = tuple(
    ConvCase.parse(text)
    for text in (
        "i3 o64 h224 k7 s2",
        "i64 o64 h56 k3",
        "i64 o256 h56 k1",
        "i128 o128 h28 k3",
        "i256 o256 h14 k3",
        "i1024 o256 h14 k1",
        "i512 o512 h7 k3",
    )
)
SHAPES = (*CIFAR, *IMAGENET)
CASES = tuple(replace(shape, batch=batch, open=share) for shape in SHAPES for batch in BATCHES for share in OPEN)


def is_cifar(case: ConvCase) -> bool:
    """Whether it is a layer of the networks for 32x32 images."""
    return replace(case, batch=1, open=100) in CIFAR


def is_quick(case: ConvCase) -> bool:
    """Whether it belongs to the short selection."""
    return is_cifar(case) and case.batch == 8 and case.open in (50, 100)
