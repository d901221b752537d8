"""Parity of each kernel family with float64, on poisoned memory; PyTorch in the same type is the yardstick.

On a dry machine the references, or the stand-in of `cases.stand_in`, compute what the GPU would.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatedconv
from benchmarks.harness import Machine, poisoned, precision, variable
from benchmarks.networks import NetworkCase
from gatedconv.bench.comparison import Row
from gatedconv.convert.verify import distance
from gatedconv.ops import _masked_conv2d_cuda

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "tf32": torch.float32, "float32": torch.float32}
UNIT_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "tf32": 2.0**-11, "float32": 2.0**-24}
TERMS = 16 * 9  # products in a result of `conv_row`
# Of a gradient through a norm, which leaves a tenth of its terms: ten times the contract of 1e-5 in float32.
GRADIENT_FLOOR = 10 * 1e-5
REPEATS = 200


def judged(row: tuple[str, str, str, str], mine: float, theirs: float, floor: float) -> Row:
    """A row of an error, failed where it exceeds twice PyTorch's own error and the rounding of the result."""
    benchmark, case, dtype, provider = row
    allowed = max(2 * theirs, floor)
    note = "passed" if mine <= allowed else f"failed: error {mine:.1e}, allowed {allowed:.1e}"
    return Row(benchmark, case, 0, dtype, provider, error=mine, note=note)


def floor_of(dtype: str) -> float:
    """Twice the unit roundoff u, of operands and of the result; in float32 sums round, too, by 0.7 sqrt(TERMS) u."""
    return 2 * UNIT_ROUNDOFF[dtype] * (math.sqrt(TERMS) if dtype == "float32" else 1)


@contextmanager
def exact_memory(dtype: str) -> Iterator[None]:
    """Poisoned memory, and tf32 only where that is the type."""
    with poisoned(), precision(dtype), torch.no_grad():
        yield


def conv_rows(machine: Machine, dtype: str) -> list[Row]:
    """The tiled convolution in every tile, dense and scattered into a stream, against float64."""
    return [
        conv_row(machine, dtype, tile)
        for tile in (_masked_conv2d_cuda.TILES[:1] if machine.dry else _masked_conv2d_cuda.TILES)
    ]


def conv_row(machine: Machine, dtype: str, tile: tuple[int, int]) -> Row:
    """One tile: relu(convolution + bias + residual) of 30 of 72 outputs; closed outputs keep relu(residual)."""
    torch.manual_seed(0)
    outputs, kept, kind = 72, 30, DTYPES[dtype]
    draw = lambda *s: torch.randn(*s).to(kind).to(machine.device)  # noqa: E731
    x = draw(2, 16, 11, 9).to(memory_format=torch.channels_last)
    weight, bias = draw(outputs, 16, 3, 3) / 12, torch.randn(outputs, device=machine.device)
    residual = draw(2, outputs, 11, 9).to(memory_format=torch.channels_last)
    order = torch.cat([torch.randperm(outputs), torch.tensor([kept])]).int().to(machine.device)
    open_ = torch.zeros(outputs, dtype=torch.bool, device=machine.device)
    open_[order[:kept].long()] = True

    def reference(to: torch.dtype) -> Tensor:
        out = F.conv2d(x.to(to), weight.to(to), bias.to(to), 1, 1)
        return (torch.where(open_[:, None, None], out, 0) + residual.to(to)).relu()

    with exact_memory(dtype):
        exact, theirs = reference(torch.float64), reference(kind)
        result = tiled_conv(machine, x, weight, bias, order, residual, dtype, tile)
        row = ("parity", f"tiled convolution {tile[0]}x{tile[1]}", dtype, "gatedconv")
        return judged(row, distance(result, exact), distance(theirs, exact), floor_of(dtype))


def tiled_conv(
    machine: Machine,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    order: Tensor,
    residual: Tensor,
    dtype: str,
    tile: tuple[int, int],
) -> Tensor:
    """The CUDA library's convolution; on a dry machine without a stand-in the reference of the operator."""
    tf32 = dtype == "tf32"
    if machine.stands_in:
        output = torch.empty_like(residual)
        packed = _masked_conv2d_cuda.conv_pack(weight, None, tf32)
        geometry = [3, 3, 1, 1, 1, 1, 1, 1]
        return _masked_conv2d_cuda.conv_run(
            x, packed, bias, None, order, residual, output, geometry, 1, False, tf32, tile
        )
    open_ = torch.zeros(len(weight), dtype=torch.bool)
    open_[order[: int(order[-1])].long()] = True
    return gatedconv.ops.masked_conv2d_reference(
        x, weight, bias.to(x.dtype), open_, padding=1, residual=residual, relu=True
    )


def resident_rows(machine: Machine, ranks: int) -> list[Row]:
    """A compact ResNet-20 in one launch of the image-resident driver, with ``ranks`` blocks per image."""
    from tests.cuda.plans import always, make_plan

    network, x = NetworkCase("resnet20", "mid-50", 3).build()
    x = x[:1, :, :12, :12] if machine.dry else x
    name, dtype = f"resident x{ranks}", "float16"
    with exact_memory(dtype):
        exact = copy.deepcopy(network).double()(x.double())
        low = network.to(DTYPES[dtype]).to(machine.device)
        given = x.to(DTYPES[dtype]).to(machine.device)
        theirs = low(given)
        if not machine.stands_in:
            result = theirs
        else:
            plan = make_plan(
                low, x, dtype=DTYPES[dtype], device=machine.device, mode="experimental", tuner=always(name)
            )
            plan.tune(given)
            if not any(found == name for runs in plan.runs.values() for _, found in runs.values()):
                return [Row("parity", name, 0, dtype, "gatedconv", note="not run: not possible on this GPU")]
            result = plan(given)
        errors = distance(result.cpu(), exact), distance(theirs.cpu(), exact)
    return [judged(("parity", name, dtype, "gatedconv"), *errors, floor_of(dtype))]


def gate_rows(machine: Machine) -> list[Row]:
    """A channel gate forward and backward against float64, and 200 repeats that have to be equal bit for bit."""
    torch.manual_seed(0)
    gate = gatedconv.ChannelGate(16).to(machine.device).train()
    x = torch.randn(64, 16, 8, 8, device=machine.device)
    return _trained(machine, "gate", gate, x, repeats=2 if machine.dry else REPEATS)


def gated_residual_rows(machine: Machine) -> list[Row]:
    """The end of a residual block in training, forward and backward, against float64."""
    torch.manual_seed(0)
    network = gatedconv.models.resnet20(gate="both", position="after", input_size=(3, 16, 16))
    block = network.layer1[1].to(machine.device).train()
    x = torch.randn(16, 16, 16, 16, device=machine.device).to(memory_format=torch.channels_last)
    return _trained(machine, "block end", block, x, repeats=2)


def _trained(machine: Machine, case: str, module: nn.Module, x: Tensor, repeats: int) -> list[Row]:
    with poisoned(), precision("float32"):
        exact = _step(copy.deepcopy(module).double(), x.double(), "off")
        theirs = _step(copy.deepcopy(module), x, "off")
        results = [_step(copy.deepcopy(module), x, "auto") for _ in range(repeats)]
    # A gradient that is 0 but for rounding has no scale of its own: that of the largest is its yardstick.
    scale = 1e-3 * max(float(b.abs().max()) for b in exact)
    errors = [
        max(
            float((a.double() - b).abs().max()) / max(scale, float(b.abs().max()))
            for a, b in zip(f, exact, strict=True)
        )
        for f in (results[0], theirs)
    ]
    same = all(torch.equal(a, b) for found in results for a, b in zip(found, results[0], strict=True))
    note = "passed" if same else "failed: repeats differ"
    return [
        judged(("parity", case, "float32", "gatedconv"), errors[0], errors[1], GRADIENT_FLOOR),
        Row("parity", f"{case}, {repeats} repeats", 0, "float32", "gatedconv", note=note),
    ]


def _step(module: nn.Module, x: Tensor, kernels: str) -> list[Tensor]:
    """Output and gradients of one training step, with a fixed incoming gradient."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with variable("GATEDCONV_TRITON", kernels):
        out: Any = module(x)
        out = out[0] if isinstance(out, tuple) else out
        incoming = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view_as(out)
        leaves = [x, *module.parameters()]
        found = torch.autograd.grad(out, leaves, incoming, allow_unused=True)
    return [out.detach(), *(grad for grad in found if grad is not None)]
