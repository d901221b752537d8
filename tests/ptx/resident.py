"""Launches nvcc's PTX of the image-resident driver on a simulated GPU, in place of the operator."""

from __future__ import annotations

import struct

import torch

from tests.ptx import nvcc
from tests.ptx.convolution import FORMATS, as_tensor, flat
from tests.ptx.machine import Machine
from tests.ptx.memory import GlobalMemory
from tests.ptx.parser import Kernel

THREADS, PIECE = 256, 4096
FORMS = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "tf32"}


def find_kernel(form: str, cluster: bool, architecture: int = 90) -> Kernel:
    """Return the kernel of a format, for one block an image or for a cluster."""
    found = nvcc.kernels(f"cuda/experimental/resident_{form}.cu", architecture)
    return next(one for name, one in found.items() if f"{FORMATS[form][1]}ELb{int(cluster)}" in name)


class Driver:
    """`run` is `gatedconv.engine.cuda.resident.resident_run`.

    Attributes:
        machines: What ran every launch.
        kernel: What to launch instead of the compiled kernel: a changed copy.
    """

    def __init__(self, seed: int = 0, architecture: int = 90) -> None:
        self.seed, self.architecture = seed, architecture
        self.machines: list[Machine] = []
        self.kernel: Kernel | None = None

    def run(self, input, stream, output, layout, tf32):
        ranks, pieces, record_at, table_at, ring_at, shared_bytes = layout[:6]
        memory = GlobalMemory()
        source, made = memory.place(flat(input)), memory.place(flat(torch.full_like(output, float("nan"))))
        arguments = struct.pack(
            "<3Q8q7i4x",
            source,
            made,
            memory.place(stream.numpy()),
            *input.stride(),
            *output.stride(),
            stream.numel() // PIECE,
            pieces,
            record_at,
            table_at,
            ring_at,
            ranks,
            shared_bytes,
        )
        form = FORMS[input.dtype]
        kernel = self.kernel or find_kernel(form, ranks > 1, self.architecture)
        machine = Machine(memory, self.seed, resident=2, slice=200)
        machine.launch(kernel, (input.shape[0] * ranks,), THREADS, [arguments], shared_bytes, ranks)
        self.machines.append(machine)
        return output.copy_(as_tensor(memory.read_back(made, flat(output)), output))
