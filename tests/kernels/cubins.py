"""Compiles what training launches for every GPU generation, without a GPU, and prints what each kernel needs.

``python -m tests.kernels.cubins few|some|all 75 90 ...`` prints JSON lines. Launches are recorded from the library's
own calls, and Triton specializes them as it would on a GPU. The process is one of its own, because one process has
either interpreted kernels or compiled ones.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

import gatedconv
from gatedconv import ops
from tests.kernels.recording import Launch, gate_step, recorded

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
HALF = torch.float16


def gate(
    kind: str = "channel",
    channels: int = 64,
    size: int = 8,
    hidden: int | None = 16,
    estimator: str = "ste",
    dtype: torch.dtype = HALF,
    layout: torch.memory_format = LAYOUTS[0],
    mode: str = "train",
    batch: int = 256,
) -> list[Launch]:
    """A gate forward and, in training, backward."""
    options: dict[str, Any] = {"hidden": hidden, "estimator": estimator}
    if kind == "flatten":
        options |= {"pool": "flatten", "feature_size": size * size}
    made = (gatedconv.LayerGate if kind == "layer" else gatedconv.ChannelGate)(channels, **options)
    made.train(mode != "eval")
    if mode == "frozen norm" and made.norm is not None:
        made.norm.eval()
    x = torch.zeros(batch, channels, size, size, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    step = gate_step(made, x)
    with recorded() as recording:
        if mode == "eval":
            made(x.detach())
        else:
            step()
    return recording.launches


def block(
    gates: str = "both",
    channels: int = 16,
    size: int = 32,
    dtype: torch.dtype = HALF,
    layout: torch.memory_format = LAYOUTS[0],
    shortcut: torch.dtype | None = None,
    hidden: int | None = 16,
) -> list[Launch]:
    """A block's end forward and backward, with the gradient of its pooled output."""
    new = lambda kind: torch.zeros(256, channels, size, size, dtype=kind).contiguous(memory_format=layout)  # noqa: E731
    x, short = new(dtype).requires_grad_(), new(shortcut or dtype).requires_grad_()
    layer = torch.ones(256, 1, dtype=dtype).requires_grad_() if gates != "channel" else None
    inner = None
    if gates != "layer":
        inner = ops.InnerGate(*gatedconv.ChannelGate(channels, hidden=hidden).arguments(256, dtype))
    one = torch.ones(channels)
    norm = ops.NormArguments(one.clone().requires_grad_(), one.clone(), one.clone(), one.clone(), torch.tensor(0))
    with recorded() as recording:
        out = ops.gated_residual(x, short, norm, layer, inner)
        (out.out.float().sum() + out.pooled.sum()).backward()
    return recording.launches


def scale(dtype: torch.dtype = HALF, layout: torch.memory_format = LAYOUTS[0]) -> list[Launch]:
    """A gate on the channels of a map, forward and backward."""
    x = torch.zeros(256, 32, 16, 16, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    with recorded() as recording:
        ops.gated_scale(x, torch.ones(256, 32, dtype=dtype).requires_grad_()).sum().backward()
    return recording.launches


def few() -> Iterator[list[Launch]]:
    """Each kernel once, as a ResNet in mixed precision launches it."""
    found: dict[str, Launch] = {}
    for launch in itertools.chain(block(), gate(hidden=None), gate("flatten", 16, 32), gate(channels=1024, size=4)):
        found.setdefault(launch.name, launch)
    wide = gate(channels=1024, size=4, hidden=None)
    found |= {launch.name: launch for launch in [*wide, *gate("layer", 16, 32)] if launch.name not in found}
    yield [*found.values(), *scale(layout=LAYOUTS[1])]


def some() -> Iterator[list[Launch]]:
    """What a ResNet trained in mixed precision launches, each kernel at least once."""
    yield gate("layer", 16, 32)
    yield gate("layer", 64, 8, estimator="gumbel", layout=LAYOUTS[1])
    yield gate(estimator="batch_mean")
    yield gate(hidden=None)
    yield gate("flatten", 16, 32)
    yield gate(channels=1024, size=4, hidden=None)
    yield gate(channels=1024, size=4)
    yield block()
    yield block(channels=64, size=8, layout=LAYOUTS[1])
    yield scale(layout=LAYOUTS[1])


def everything() -> Iterator[list[Launch]]:
    """Every estimator, depth, pool, mode, dtype, layout and stage, though not each with each."""
    yield from some()
    kinds = (("layer", 16, 32), ("channel", 64, 8), ("flatten", 16, 32))
    for (kind, channels, size), hidden, estimator in itertools.product(kinds, (16, None), ops.ESTIMATORS):
        for mode in ("train", "eval"):
            yield gate(kind, channels, size, hidden, estimator, mode=mode)
    for (kind, channels, size), dtype, layout in itertools.product(kinds, DTYPES, LAYOUTS):
        yield gate(kind, channels, size, dtype=dtype, layout=layout)
    for kind, channels, size in kinds:
        yield gate(kind, channels, size, mode="frozen norm")
    for hidden in (1, 33, 64, 128):
        yield gate(hidden=hidden, channels=33)
    for gates, dtype, layout in itertools.product(("layer", "channel", "both"), DTYPES, LAYOUTS):
        yield block(gates, dtype=dtype, layout=layout)
        yield scale(dtype, layout)
    for channels, size in ((32, 16), (64, 8), (256, 56), (2048, 7)):
        yield block(channels=channels, size=size)
    yield block(dtype=HALF, shortcut=torch.float32)
    yield block(hidden=None)
    yield gate("layer", 1, 1, hidden=1, batch=2)  # sizes of 1 are constants
    yield block(channels=1, size=1)


def driver(capability: int) -> Any:
    """A driver of a GPU that is not there: enough for Triton to specialize a launch and compile it."""
    return SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: capability,  # kernels are cached by device
        get_current_stream=lambda device: 0,
    )


def compiled(launch: Launch) -> dict[str, object]:
    """Compile for the active driver and return the kernel's name and resources."""
    result = launch.kernel.warmup(*launch.arguments.values(), grid=launch.grid, **launch.options)
    constants = {p.name: launch.arguments[p.name] for p in launch.kernel.params if p.is_constexpr}
    return {
        "kernel": launch.name,
        "capability": result.metadata.target.arch,
        "hash": result.hash,
        "constants": str(constants),
        "shared": result.metadata.shared,
        "reduces": "tt.reduce" in result.asm["ttir"],
        "fused": result.metadata.enable_fp_fusion,
        **_resources(result.asm["cubin"]),
    }


def _resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text.stdout))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"]), "local": int(found["LOCAL"])}


def main(which: str, capabilities: list[str]) -> None:
    """Print a JSON line for each kernel that is compiled."""
    sets = {"few": few, "some": some, "all": everything}[which]
    launches = list(itertools.chain.from_iterable(sets()))
    for capability in capabilities:
        triton.runtime.driver.set_active(driver(int(capability)))
        seen = set()
        for launch in launches:
            row = compiled(launch)
            if row["hash"] not in seen:
                seen.add(row["hash"])
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2:])
