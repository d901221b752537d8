"""A packed network run in one operator call; `gatedconv.Engine` makes the packed form."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gatedconv import _native

_library: torch.library.Library | None = None


def unavailable() -> str | None:
    """Load the native library; return why there is none, None if there is one."""
    global _library
    library = _native.load("cpu")
    if not library.available:
        return library.reason or "no native library"
    if _library is None:
        _library = torch.library.Library("gatedconv", "FRAGMENT")
        torch.library.register_fake("gatedconv::plan_run", _run_fake, lib=_library)
        torch.library.register_fake("gatedconv::plan_times", _times_fake, lib=_library)
    return None


def plan_run(input: Tensor, program: Tensor, weights: Tensor, shape: Sequence[int], workers: int = 0) -> Tensor:
    """Run a plan. `unavailable` must have returned None in this process.

    Args:
        input: (N, C, H, W), float32, CPU, any strides.
        program: (P,), int64: the instructions.
        weights: (Q,), float32: the packed weights.
        shape: What `plan_output_size` reads.
        workers: Threads; 0 for as many as PyTorch uses.

    Returns:
        (N, C') or (N, C', H', W'), contiguous.
    """
    return torch.ops.gatedconv.plan_run.default(input, program, weights, shape, workers)


def plan_times(input: Tensor, program: Tensor, weights: Tensor, workers: int = 0) -> Tensor:
    """Run a plan, all threads at every step; return how long each step but "view" took, (steps,), float64, in ms."""
    return torch.ops.gatedconv.plan_times.default(input, program, weights, workers)


def plan_output_size(size: Sequence[int], shape: Sequence[int]) -> list[int]:
    """Work out a plan's output size.

    Args:
        size: The input's (N, C, H, W).
        shape: Output channels, output rank (2 or 4), then for every layer that changes height or width:
            extent, stride, total padding of the height, then of the width. Extent 0: the new size is `stride`;
            a negative extent: the size is multiplied by -extent; a negative stride: the new size is rounded up.

    Raises:
        ValueError: The input is empty or smaller than a kernel, or makes no single pixel where the output is a vector.
    """
    height, width = size[2], size[3]
    if height < 1 or width < 1:
        raise ValueError(f"input of {height} x {width} pixels is empty")
    for i in range(2, len(shape), 6):
        if shape[i] == 0:
            height, width = shape[i + 1], shape[i + 4]
            continue
        if shape[i] < 0:
            height, width = -shape[i] * height, -shape[i + 3] * width
            continue
        if height + shape[i + 2] < shape[i] or width + shape[i + 5] < shape[i + 3]:
            raise ValueError(
                f"input of {size[2]} x {size[3]} pixels is too small: a layer of {shape[i]} x {shape[i + 3]} "
                f"pixels would run over {height} x {width}"
            )
        height, width = _window_count(height, *shape[i : i + 3]), _window_count(width, *shape[i + 3 : i + 6])
    if shape[1] == 4:
        return [size[0], shape[0], height, width]
    if height != 1 or width != 1:
        raise ValueError(
            f"input of {size[2]} x {size[3]} pixels leaves {height} x {width} in front of the model's linear layer "
            f"or flattening, which was built for one"
        )
    return [size[0], shape[0]]


def _window_count(size: int, extent: int, stride: int, padding: int) -> int:
    if stride > 0:
        return (size + padding - extent) // stride + 1
    count = -((size + padding - extent) // stride) + 1  # rounds up
    last = (count - 1) * -stride  # where the last window begins
    return count - 1 if last >= size + padding // 2 else count


# As in csrc/cpu/plan_decode.cpp.
_LARGEST = 2**18

# Outputs of less are allocated without asking first.
_SMALL = 2**28


def plan_check(size: Sequence[int], shape: Sequence[int]) -> None:
    """Check that a plan can run on an input of `size` (N, C, H, W), before the operator raises a longer error.

    Raises:
        ValueError: As `plan_output_size`; a height or width beyond 2^18; an output that memory has no room for.
    """
    output = plan_output_size(size, shape)
    if torch.compiler.is_compiling():
        return
    if max(size[2], size[3]) > _LARGEST:
        raise ValueError(f"input of {size[2]} x {size[3]} pixels is too large: at most {_LARGEST} a side")
    if (count := math.prod(output)) > _SMALL:
        try:
            torch.empty(count, dtype=torch.float32, device="cpu")
        except RuntimeError:
            raise ValueError(
                f"input of shape {tuple(size)} is too large: memory has no room for the {4 * count / 2**30:.0f} GiB "
                f"of its output {tuple(output)}"
            ) from None


def _run_fake(input: Tensor, program: Tensor, weights: Tensor, shape: Sequence[int], workers: int = 0) -> Tensor:
    return input.new_empty(plan_output_size(input.shape, shape))


def _times_fake(input: Tensor, program: Tensor, weights: Tensor, workers: int = 0) -> Tensor:
    # The number of steps is in the program, whose values are not known here.
    return input.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.float64)


def plan_isa(bf16: bool = False) -> str:
    """Return the instruction set that plans run on here: "portable", "avx2" or "avx512".

    Args:
        bf16: The one for bfloat16 products instead: "amx", "avx512_bf16" or "emulated".
    """
    return str(torch.ops.gatedconv.plan_isa(bf16))


def plan_workspace(size: Sequence[int], program: Tensor, workers: int) -> int:
    """Return the bytes that a run needs in addition to its tensors for an input of `size` (N, C, H, W)."""
    return int(torch.ops.gatedconv.plan_workspace(size, program, workers))


def plan_passing(size: Sequence[int], program: Tensor) -> list[bool]:
    """Return for every step but "view" whether the next one reads what it writes band by band, for an input of `size`.

    Such a map is never whole (csrc/cpu/plan_bands.h). Which ones are depends on the machine's second-level cache.
    """
    return [bool(passes) for passes in torch.ops.gatedconv.plan_passing(size, program)]


def plan_release() -> int:
    """Free the workspaces that finished runs have left for the next ones; returns their bytes."""
    return int(torch.ops.gatedconv.plan_release())
