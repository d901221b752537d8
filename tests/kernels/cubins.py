"""Compiles every kernel for every GPU generation, without a GPU, and prints what each needs as JSON lines.

Run as ``python -m tests.kernels.cubins 75 90 ...`` in a process of its own: a process has either interpreted
kernels or compiled ones.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from gatedconv.kernels import gate, gate_backward, gated_residual, gated_scale
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HEAD = {
    "HIDDEN": True, "BATCH_STATS": True, "UPDATE": True, "TRAIN": True, "ESTIMATOR": "ste", "NOISY": False,
    "BLOCK_N": 64, "BLOCK_H": 16, "BLOCK_O": 16,
}  # fmt: skip
GRAD = {"HAS_GATE": True, "HAS_RATE": True, "HAS_LOGITS": False, "ESTIMATOR": "ste", "NOISY": False}
TAIL = GRAD | {"BATCH_STATS": True, "BLOCK_N": 64, "BLOCK_H": 16, "BLOCK_O": 16}
FLAT = {"HIDDEN": False, "BATCH_STATS": False}
WIDE = {"BLOCK_N": 16, "BLOCK_H": 128}
NOISE = {"ESTIMATOR": "gumbel", "NOISY": True}
LOGITS = GRAD | {"CENTRE": True, "BLOCK_N": 64, "BLOCK_O": 16, "ESTIMATOR": "batch_mean"}
FACTORS = {"HAS_LAYER": True, "HAS_CHANNEL": True}
INCOMING = FACTORS | {"HAS_GRAD": True, "HAS_POOLED": True}
FINISH = {"BLOCK_G": 128, "BLOCK_C": 32, "BLOCK_N": 32}
NCHW, NHWC = {"BLOCK_C": 16, "BLOCK_S": 128}, {"BLOCK_C": 64, "BLOCK_S": 32}
# The tile sizes that the launchers choose: (kernel, constants, number of stages).
CASES = [
    (gate.gate_pool_dense, HEAD | NHWC | {"TICKET": False, "BLOCK_M": 16}, 1),
    (gate.gate_pool_dense, HEAD | NCHW | {"TICKET": True, "BLOCK_M": 16}, 1),
    (gate.gate_pool_dense, HEAD | NHWC | FLAT | {"TICKET": True, "BLOCK_M": 64}, 1),
    (gate.gate_dense, {"BLOCK_N": 16, "BLOCK_M": 16, "BLOCK_K": 64}, 2),
    (gate.gate_dense, {"BLOCK_N": 16, "BLOCK_M": 32, "BLOCK_K": 64}, 2),
    (gate.gate_tail, HEAD, 1),
    (gate.gate_tail, HEAD | WIDE, 1),
    (gate.gate_tail, HEAD | NOISE, 1),
    (gate.gate_tail, HEAD | {"ESTIMATOR": "batch_mean"}, 1),
    (gate_backward.gate_backward_logits, LOGITS, 3),
    (gate_backward.gate_backward_tail, TAIL, 1),
    (gate_backward.gate_backward_tail, TAIL | WIDE, 1),
    (gate_backward.gate_backward_tail, TAIL | NOISE, 1),
    (gate_backward.gate_backward_dense, {"NEED_DX": True, "BLOCK_N": 16, "BLOCK_M": 16, "BLOCK_K": 16}, 2),
    (gate_backward.gate_backward_dense, {"NEED_DX": True, "BLOCK_N": 16, "BLOCK_M": 32, "BLOCK_K": 32}, 2),
    (gated_residual.statistics, NCHW, 3),
    (gated_residual.statistics, NHWC, 3),
    (gated_residual.finish_statistics, FINISH | {"NORMED": True, "UPDATE": True}, 3),
    (gated_residual.residual_forward, FACTORS | NCHW | {"POOL": True}, 3),
    (gated_residual.residual_forward, FACTORS | NHWC | {"POOL": True}, 3),
    (gated_residual.residual_reduce, INCOMING | NCHW, 3),
    (gated_residual.residual_reduce, INCOMING | NHWC, 3),
    (gated_residual.finish_reduce, FINISH | {"HAS_LAYER": True, "HAS_NORMED": True, "BLOCK_T": 4}, 3),
    (gated_residual.residual_backward, INCOMING | NCHW | {"HAS_NORMED": True, "NEED_SHORTCUT": True}, 3),
    (gated_residual.residual_backward, INCOMING | NHWC | {"HAS_NORMED": True, "NEED_SHORTCUT": True}, 3),
    (gated_scale.gated_scale_forward, NCHW, 3),
    (gated_scale.gated_scale_backward, NHWC, 3),
]
HALF = {"x_ptr", "dx_ptr", "gate_ptr", "d_gate_ptr", "out_ptr", "d_out_ptr", "shortcut_ptr", "d_shortcut_ptr"}
SCALARS = {"eps", "temperature", "norm_momentum", "momentum", "scale"}


def compile_case(
    kernel: triton.JITFunction, constants: dict[str, object], stages: int, capability: int
) -> dict[str, object]:
    """Compile for one generation and return the kernel's name and resources.

    As at a launch, a stride of 1 is a constant (of positions in NCHW, of channels in channels_last) and
    pointers and the other strides are known to be multiples of 16.
    """
    names = list(inspect.signature(kernel.fn).parameters)
    unit = "_stride_c" if constants.get("BLOCK_C") == NHWC["BLOCK_C"] else "_stride_s"
    constants = constants | {name: 1 for name in names if name.endswith(unit)}
    signature = {name: _type(name, constants) for name in names}
    even = [name.endswith("_ptr") or ("_stride_" in name and name not in constants) for name in names]
    attributes = {(i,): [["tt.divisibility", 16]] for i, is_even in enumerate(even) if is_even}
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=dict(constants), attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_stages": stages},
    )
    return {
        "kernel": kernel.fn.__name__,
        "capability": capability,
        "shared": compiled.metadata.shared,
        **_resources(compiled.asm["cubin"]),
    }


def _type(name: str, constants: dict[str, object]) -> str:
    if name in constants:
        return "constexpr"
    if name.endswith("_ptr"):
        integer = {"run_count_ptr": "*i64", "ticket_ptr": "*i32"}
        return integer.get(name, "*fp16" if name in HALF else "*fp32")
    return "fp32" if name in SCALARS else "i32"


def _resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text.stdout))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"]), "local": int(found["LOCAL"])}


def ones(kernel: triton.JITFunction, constants: dict[str, object]) -> dict[str, object]:
    """Constants of a launch whose sizes are all 1, which Triton turns into plain numbers."""
    sizes = {"N", "C", "HW", "K", "M", "H", "O", "S", "G", "T", "N_PER_GROUP", "C_PER_SLICE", "K_PER_SLICE"}
    if constants.get("BATCH_STATS"):
        sizes -= {"N"}  # one sample has no statistics
    return constants | {name: 1 for name in inspect.signature(kernel.fn).parameters if name in sizes}


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        for case_kernel, case_constants, case_stages in CASES:
            if argument == "ones":
                row = compile_case(case_kernel, ones(case_kernel, case_constants), case_stages, 80)
            else:
                row = compile_case(case_kernel, case_constants, case_stages, int(argument))
            print(json.dumps(row), flush=True)
