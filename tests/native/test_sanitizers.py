"""Compiles the native tests without PyTorch, under AddressSanitizer and UBSan, and runs them."""

import shlex
import subprocess
from pathlib import Path

import pytest

from gatedconv import _build

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"]

# Each test with the sources that it is linked with.
TESTS = {
    "masked_conv2d_test.cpp": [],
    "masked_planes_test.cpp": [
        "cpu/map_weights.cpp",
        "cpu/masked_maps.cpp",
        "cpu/masked_pack.cpp",
        "cpu/masked_planes.cpp",
        "cpu/masked_planes_portable.cpp",
        "cpu/plan_portable.cpp",
    ],
    "plan_test.cpp": [
        "cpu/bf16_x86.cpp",
        "cpu/plan.cpp",
        "cpu/plan_avx2.cpp",
        "cpu/plan_avx512.cpp",
        "cpu/plan_bands.cpp",
        "cpu/plan_decode.cpp",
        "cpu/plan_portable.cpp",
        "cpu/plan_schedule.cpp",
        "cpu/worker_pool.cpp",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TESTS)
def test_under_sanitizers(name, tmp_path):
    compiler = shlex.split(_build.find_compiler())
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    ready = [*compiler, *SANITIZE, str(probe), "-o", str(tmp_path / "probe")]
    if subprocess.run(ready, capture_output=True).returncode != 0:
        pytest.skip(f"{compiler[0]} has no sanitizers here")
    objects = []
    for source in [HERE / name, *(CSRC / path for path in TESTS[name])]:
        objects.append(str(tmp_path / f"{source.stem}.o"))
        flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", *SANITIZE, *_build._isa_flags(source), f"-I{CSRC}"]
        built = subprocess.run(
            [*compiler, *flags, "-c", str(source), "-o", objects[-1]], capture_output=True, text=True
        )
        assert built.returncode == 0, built.stderr
    program = str(tmp_path / "program")
    linked = subprocess.run([*compiler, *SANITIZE, *objects, "-o", program, "-pthread"], capture_output=True, text=True)
    assert linked.returncode == 0, linked.stderr
    done = subprocess.run([program], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize(
    "fault", ["int* p = new int[2]; int v = p[argc + 1]; delete[] p; return v;", "return (2147483647 + argc) & 1;"]
)
def test_the_sanitizers_would_notice(fault, tmp_path):
    source = tmp_path / "fault.cpp"
    source.write_text(f"int main(int argc, char**) {{ {fault} }}\n")
    program = str(tmp_path / "fault")
    command = [*shlex.split(_build.find_compiler()), *SANITIZE, str(source), "-o", program]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("no sanitizers here")
    assert subprocess.run([program], capture_output=True).returncode != 0
