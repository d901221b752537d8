"""Counts the instructions of a plan on a small network: a measure that is independent of the load of the machine.

`python -m tests.native.instruction_count` records those of this compiler in benchmarks/results/callgrind.json;
tests/native/test_instruction_count.py compares. Valgrind knows no AVX-512, so AVX2 and the portable unit are counted.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tempfile
from pathlib import Path

from gatedconv import _build

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "benchmarks/results/callgrind.json"
SOURCES = [ROOT / "tests/native/plan_count.cpp"] + [
    ROOT / f"csrc/cpu/{name}.cpp"
    for name in (
        "bf16_x86",
        "plan",
        "plan_bands",
        "plan_decode",
        "plan_schedule",
        "plan_portable",
        "plan_avx2",
        "plan_avx512",
        "worker_pool",
    )
]
ISAS = ("avx2", "portable")


def compiler_version() -> str:
    """Return the first line of the compiler's version: counts of different compilers cannot be compared."""
    command = [*shlex.split(_build.find_compiler()), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def count_instructions(folder: Path) -> dict[str, int]:
    """Compile the network into `folder`, run it under callgrind, return the instructions of each instruction set."""
    compiler = shlex.split(_build.find_compiler())
    objects = []
    for source in SOURCES:
        objects.append(str(folder / f"{source.stem}.o"))
        flags = [*_build.CXX_FLAGS, *_build._isa_flags(source), f"-I{ROOT / 'csrc'}"]
        subprocess.run([*compiler, *flags, "-c", str(source), "-o", objects[-1]], check=True)
    program = str(folder / "plan_count")
    subprocess.run([*compiler, *objects, "-o", program, "-pthread"], check=True)
    counts = {}
    for isa in ISAS:
        command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
        command += ["--toggle-collect=gatedconv::run(*", program]
        environment = {"GATEDCONV_ISA": isa, "PATH": "/usr/bin:/bin"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        assert done.stdout.startswith(isa), done.stdout
        found = re.search(r"Collected : (\d+)", done.stderr)
        assert found, done.stderr
        counts[isa] = int(found[1])
    return counts


def main() -> None:
    """Record the counts."""
    with tempfile.TemporaryDirectory() as folder:
        counts = count_instructions(Path(folder))
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps({"compiler": compiler_version(), "instructions": counts}, indent=2) + "\n")


if __name__ == "__main__":
    main()
