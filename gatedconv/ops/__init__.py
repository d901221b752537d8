"""Stateless operators.

Each with a kernel has ``<name>_reference``: the same function in plain PyTorch, without the cache argument ``packed``.
"""

from gatedconv.ops._gate_args import GateOptions, GateOutput, GateParameters, GateStatistics
from gatedconv.ops._masked_conv2d_cuda import cuda_kernels
from gatedconv.ops._masked_conv2d_packed import PackedConv
from gatedconv.ops._triton import kernels_run_on
from gatedconv.ops.estimate import ESTIMATORS, estimate
from gatedconv.ops.gate import gate, gate_reference
from gatedconv.ops.gated_residual import (
    InnerGate,
    NormArguments,
    ResidualOutput,
    gated_residual,
    gated_residual_reference,
)
from gatedconv.ops.gated_scale import gated_scale, gated_scale_reference
from gatedconv.ops.global_average_pool import global_average_pool
from gatedconv.ops.masked_conv2d import masked_conv2d, masked_conv2d_reference
from gatedconv.ops.ste import ste, ste_reference

__all__ = [
    "ESTIMATORS",
    "GateOptions",
    "GateOutput",
    "GateParameters",
    "GateStatistics",
    "InnerGate",
    "NormArguments",
    "PackedConv",
    "ResidualOutput",
    "cuda_kernels",
    "estimate",
    "gate",
    "gate_reference",
    "gated_residual",
    "gated_residual_reference",
    "gated_scale",
    "gated_scale_reference",
    "global_average_pool",
    "kernels_run_on",
    "masked_conv2d",
    "masked_conv2d_reference",
    "ste",
    "ste_reference",
]
