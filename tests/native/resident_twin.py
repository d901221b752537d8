"""The resident driver's body as a program, and a stand-in for the operator that runs cases through it."""

from __future__ import annotations

import shlex
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from gatedconv import _build
from tests.native.test_sanitizers import CSRC, HERE

MATHS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
RACES = ["-fsanitize=thread", "-g"]


class Twin:
    """The program, kept running; `run` is `gatedconv.engine.cuda.resident.resident_run` on the CPU."""

    def __init__(self, folder: Path, sanitize: list[str]) -> None:
        program = build(folder, sanitize)
        self.process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.layouts: list[list[int]] = []

    def run(self, input, stream, output, layout, tf32):
        assert tf32 == (input.dtype == torch.float32)
        assert input.is_contiguous(memory_format=torch.channels_last)
        self.layouts.append(list(layout))
        header = [MATHS[input.dtype], input.shape[0], stream.numel(), *layout]
        self.process.stdin.write(struct.pack(f"{len(header)}i", *header))
        for tensor in (stream, input.permute(0, 2, 3, 1)):
            self.process.stdin.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        self.process.stdin.flush()
        count = output.numel() * output.itemsize
        data = self.process.stdout.read(count)
        assert len(data) == count, f"the program ended: {self.process.poll()}"
        n, c, h, w = output.shape
        output.copy_(torch.frombuffer(bytearray(data), dtype=output.dtype).view(n, h, w, c).permute(0, 3, 1, 2))
        return output

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        assert self.process.wait(60) == 0


def build(folder: Path, sanitize: list[str]) -> str:
    compiler = shlex.split(_build.find_compiler())
    probe = folder / "probe.cpp"
    probe.write_text("#include <thread>\nint main() { std::thread([] {}).join(); }\n")
    tried = subprocess.run([*compiler, *sanitize, str(probe), "-o", str(folder / "probe")], capture_output=True)
    if tried.returncode or subprocess.run([str(folder / "probe")], capture_output=True).returncode:
        pytest.skip(f"{compiler[0]} has no such sanitizer here")
    program = str(folder / "resident_twin")
    flags = ["-std=c++20", "-O0", "-Wall", "-Wextra", "-Wno-unknown-pragmas", *sanitize, f"-I{CSRC}"]
    built = subprocess.run(
        [*compiler, *flags, str(HERE / "resident_twin.cpp"), "-o", program], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return program
