"""What nvcc makes of the kernels: one for every tile and format, the instructions they should hold, no spills.

What the installation built (in CI: for 7.5 and 9.0) is looked at as it is; the other architectures are compiled here.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gatedconv import _build, _native

CSRC = Path(__file__).parents[2] / "csrc"
FORMATS = {"Half": (75, "HMMA"), "BFloat16": (80, "HMMA"), "TensorFloat32": (80, "HMMA"), "Float32": (75, "FFMA")}
FILES = {"f16": "Half", "bf16": "BFloat16", "tf32": "TensorFloat32", "fp32": "Float32"}
TILES = {(rows, columns) for rows in (1, 2) for columns in (1, 2, 4, 8)}
# ptxas puts a register or two aside in some corners; anything above is a tile that is too large.
STACK_BYTES = 16


def cuobjdump() -> str:
    on_path = shutil.which("cuobjdump")
    if on_path:
        return on_path
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("no cuobjdump here")
    return str(tool)


def told(*command: str) -> str:
    return subprocess.run([cuobjdump(), *command], capture_output=True, text=True, check=True).stdout


def resources(path: Path) -> dict[int, dict[str, dict[str, int]]]:
    """{capability: {kernel: {"REG": .., "STACK": .., "SHARED": .., "LOCAL": ..}}} of the convolutions."""
    found: dict[int, dict[str, dict[str, int]]] = {}
    capability, name = 0, ""
    for line in told("--dump-resource-usage", str(path)).splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            capability = int(match[1])
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif "REG:" in line and "conv_kernel" in name:
            values = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
            found.setdefault(capability, {})[name] = values
    return found


def instructions(path: Path, capability: int) -> dict[str, set[str]]:
    """{kernel: opcodes} of the convolutions for one architecture."""
    opcodes: dict[str, set[str]] = {}
    name = ""
    for line in told("--dump-sass", "-arch", f"sm_{capability}", str(path)).splitlines():
        if match := re.search(r"Function : (\S+)", line):
            name = match[1]
        elif "conv_kernel" in name and (match := re.search(r"\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", line)):
            opcodes.setdefault(name, set()).add(match[1])
    return opcodes


def described(name: str) -> tuple[str, tuple[int, int]]:
    """Format and tile of a mangled kernel name: ...conv_kernelINS_4HalfELi1ELi8EE..."""
    match = re.search(r"conv_kernelINS_\d+(\w+?)ELi(\d)ELi(\d)E", name)
    assert match, name
    return match[1], (int(match[2]), int(match[3]))


def check(path: Path, capability: int, formats: set[str]) -> None:
    found = resources(path)[capability]
    kernels = {described(name) for name in found}
    assert kernels == {(form, tile) for form in formats for tile in TILES}
    opcodes = instructions(path, capability)
    for name, used in found.items():
        oldest, wanted = FORMATS[described(name)[0]]
        held = {opcode.split(".")[0] for opcode in opcodes[name]}
        if capability < oldest:
            assert not held & {"HMMA", "FFMA", "LDG", "STG"}, f"{name} has a body"  # never launched there
            continue
        assert 0 < used["REG"] <= 168 and used["STACK"] <= STACK_BYTES and used["LOCAL"] == 0, (name, used)
        assert wanted in held, f"{name} on sm_{capability} holds no {wanted}"
        assert ("LDSM" in held) == (wanted == "HMMA"), name  # fragments come by ldmatrix
        assert "HMMA" not in held or wanted == "HMMA", f"{name} is to be plain float32"
        if capability >= 80:
            assert "LDGSTS" in held, f"{name} does not copy asynchronously"
        tf32 = any("TF32" in opcode for opcode in opcodes[name])
        assert tf32 == (described(name)[0] == "TensorFloat32"), name


@pytest.fixture(scope="module")
def library() -> Path:
    path = Path(_native.__file__).parent / _build.library_name("cuda")
    if not path.exists():
        pytest.skip(f"no cuda library here: {_native.build_info().get('reasons', {}).get('cuda')}")
    return path


@pytest.mark.parametrize("capability", [75, 90])
def test_the_built_library(library, capability):
    if capability not in resources(library):
        pytest.skip(f"the library was built without sm_{capability}")
    check(library, capability, set(FORMATS))


def test_formats_that_tell_kernels_apart_are_seen():
    """The checks read opcodes and names: they must notice when there are none."""
    assert described("_ZN9gatedconv11conv_kernelINS_8BFloat16ELi2ELi4EEEvNS_8ConvArgsE") == ("BFloat16", (2, 4))
    with pytest.raises(AssertionError):
        described("_ZN9gatedconv11pack_kernelINS_4HalfEEEv")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", FILES)
def test_every_architecture(name, tmp_path):
    try:
        toolkit = _build.check_cuda(_build.find_torch())
    except _build.BuildError as error:
        pytest.skip(str(error))
    output = tmp_path / f"{name}.o"
    capabilities = (75, 80, 86, 89, 90)
    flags = [flag for c in capabilities for flag in ("-gencode", f"arch=compute_{c},code=sm_{c}")]
    command = [str(toolkit.root / "bin/nvcc"), *_build.NVCC_FLAGS, f"-I{CSRC}", *flags]
    built = subprocess.run([*command, "-c", str(CSRC / f"cuda/conv_{name}.cu"), "-o", str(output)], capture_output=True)
    assert built.returncode == 0, built.stderr.decode()
    for capability in capabilities:
        check(output, capability, {FILES[name]})
