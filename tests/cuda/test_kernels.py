"""What nvcc makes of the kernels: one for every tile and format, the instructions they should hold, no spills.

What the installation built (in CI: for 7.5 and 9.0) is looked at as it is; the other architectures are compiled here.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gatedconv import _build, _native

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
FORMATS = {"Half": (75, "HMMA"), "BFloat16": (80, "HMMA"), "TensorFloat32": (80, "HMMA"), "Float32": (75, "FFMA")}
FILES = {"f16": "Half", "bf16": "BFloat16", "tf32": "TensorFloat32", "fp32": "Float32"}
RESIDENT = {name: form for name, form in FILES.items() if form != "Float32"}
CAPABILITIES = (75, 80, 86, 89, 90)
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


def dump(*command: str) -> str:
    return subprocess.run([cuobjdump(), *command], capture_output=True, text=True, check=True).stdout


def resources(path: Path, kernel: str = "conv_kernel") -> dict[int, dict[str, dict[str, int]]]:
    """{capability: {name: {"REG": .., "STACK": .., "SHARED": .., "LOCAL": ..}}} of the instances of a kernel."""
    found: dict[int, dict[str, dict[str, int]]] = {}
    capability, name = 0, ""
    for line in dump("--dump-resource-usage", str(path)).splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            capability = int(match[1])
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif "REG:" in line and kernel in name:
            values = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
            found.setdefault(capability, {})[name] = values
    return found


def instructions(path: Path, capability: int, kernel: str = "conv_kernel") -> dict[str, set[str]]:
    """{name: opcodes} of the instances of a kernel for one architecture."""
    opcodes: dict[str, set[str]] = {}
    name = ""
    for line in dump("--dump-sass", "-arch", f"sm_{capability}", str(path)).splitlines():
        if match := re.search(r"Function : (\S+)", line):
            name = match[1]
        elif kernel in name and (match := re.search(r"\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", line)):
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


def check_resident(path: Path, capability: int, formats: set[str]) -> None:
    """The resident driver: a kernel for one block an image, and one for a cluster, which begins at 9.0."""
    found = resources(path, "resident_kernel")[capability]
    opcodes = instructions(path, capability, "resident_kernel")
    kernels = {name: re.search(r"resident_kernelINS_\d+(\w+?)ELb([01])E", name) for name in found}
    assert {match.groups() for match in kernels.values()} == {(form, cluster) for form in formats for cluster in "01"}
    for name, match in kernels.items():
        used, cluster = found[name], match[2] == "1"
        held = {opcode.split(".")[0] for opcode in opcodes[name]}
        if capability < max(FORMATS[match[1]][0], 90 if cluster else 0):
            assert not held & {"HMMA", "LDG", "STG", "LDSM"}, f"{name} has a body"  # never launched there
            continue
        # Two blocks of 256 threads share the 65536 registers of a multiprocessor.
        assert 0 < used["REG"] <= 128 and used["STACK"] <= STACK_BYTES and used["LOCAL"] == 0, (name, used)
        assert {"HMMA", "LDSM"} <= held and ("LDGSTS" in held) == (capability >= 80), name
        assert any("TF32" in opcode for opcode in opcodes[name]) == (match[1] == "TensorFloat32"), name
        assert any("CGABAR" in opcode for opcode in held) == cluster, f"{name}: the barrier of a cluster"


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
    check_resident(library, capability, set(RESIDENT.values()))


def test_formats_that_distinguish_kernels_are_seen():
    """The checks read opcodes and names: they must notice when there are none."""
    assert described("_ZN9gatedconv11conv_kernelINS_8BFloat16ELi2ELi4EEEvNS_8ConvArgsE") == ("BFloat16", (2, 4))
    with pytest.raises(AssertionError):
        described("_ZN9gatedconv11pack_kernelINS_4HalfEEEv")


def compiled(source: str, capabilities: tuple[int, ...] = CAPABILITIES) -> Path:
    """The object of a source for some architectures; kept with the build's own, by what went into it."""
    try:
        toolkit = _build.check_cuda(_build.find_torch())
    except _build.BuildError as error:
        pytest.skip(str(error))
    flags = [flag for c in capabilities for flag in ("-gencode", f"arch=compute_{c},code=sm_{c}")]
    nvcc = str(toolkit.root / "bin/nvcc")
    headers = sorted([*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh")])
    version = subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(version + "\0".join([*_build.NVCC_FLAGS, *flags]).encode())
    for path in (*headers, CSRC / source):
        digest.update(path.read_bytes())
    output = ROOT / "build/objects" / f"{Path(source).stem}-every-{digest.hexdigest()[:16]}.o"
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        part = output.with_suffix(f".{os.getpid()}")
        command = [nvcc, *_build.NVCC_FLAGS, f"-I{CSRC}", *flags, "-c", str(CSRC / source), "-o", str(part)]
        built = subprocess.run(command, capture_output=True)
        assert built.returncode == 0, built.stderr.decode()
        part.replace(output)
    return output


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", FILES)
def test_every_architecture(name):
    output = compiled(f"cuda/conv_{name}.cu")
    for capability in CAPABILITIES:
        check(output, capability, {FILES[name]})


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", RESIDENT)
def test_the_resident_driver_on_every_architecture(name):
    """On those that the library was not built for: a minute of nvcc, unless the objects are there."""
    path = Path(_native.__file__).parent / _build.library_name("cuda")
    built = resources(path, "resident_kernel") if path.exists() else {}
    capabilities = tuple(c for c in CAPABILITIES if c not in built)
    output = compiled(f"cuda/experimental/resident_{name}.cu", capabilities)
    for capability in capabilities:
        check_resident(output, capability, {RESIDENT[name]})
