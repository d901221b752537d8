import json
import re
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.packaging.conftest import ROOT, build_wheel, install, run

# Sdists and wheels are built, and the library is compiled.
pytestmark = pytest.mark.slow

# One layer against PyTorch's own convolution; prints which library ran, as JSON on the last line.
RUN_A_LAYER = """
import json, sys, warnings
import torch, torch.nn.functional as F
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import gatedconv, gatedconv.kernels
    from gatedconv.ops import masked_conv2d
    x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    mask = torch.tensor([True, False, True, True])
    for _ in range(2):
        out = masked_conv2d(x, w, None, mask, padding=1)
torch.testing.assert_close(out, F.conv2d(x, w, padding=1) * mask[:, None, None])
from gatedconv import _native
library = _native.load("cpu")
warned = [str(w.message) for w in caught if "gatedconv" in str(w.message)]
print(json.dumps({"file": gatedconv.__file__, "source": library.source, "reason": library.reason, "warned":
warned}))
"""

# The README's examples, one after the other, in an environment that cannot compile.
README = """
{examples}
assert engine.plans and gatedconv.count_macs(small, images[:1]) < gatedconv.count_macs(model, images[:1])
"""


def run_a_layer(python: Path, folder: Path, **variables: str) -> dict:
    done = run([str(python), "-c", RUN_A_LAYER], folder, **variables)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert not Path(told["file"]).is_relative_to(ROOT), "the checkout ran instead of the wheel"
    return told


def modules_of(project: Path) -> set[str]:
    own = {path.relative_to(project).as_posix() for path in (project / "gatedconv").rglob("*.py")}
    kernels = {f"gatedconv/{path.relative_to(project).as_posix()}" for path in (project / "kernels").rglob("*.py")}
    native = {
        f"gatedconv/_csrc/{path.relative_to(project / 'csrc').as_posix()}"
        for path in (project / "csrc").rglob("*")
        if path.suffix in (".cpp", ".cu", ".h", ".cuh")
    }
    return own | kernels | native


def test_the_sdist_holds_everything_that_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"csrc/library.cpp", "kernels/__init__.py", "gatedconv/_build.py", "setup.py", "LICENSE"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", "_build_info.json"))]


def test_the_pure_wheel_holds_every_module_and_source(project, pure_wheel):
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(pure_wheel) as archive:
        names = set(archive.namelist())
        info = json.loads(archive.read("gatedconv/_build_info.json"))
    assert len(modules_of(project)) > 40 and modules_of(project) - names == set()
    assert "gatedconv/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "kernels/", "csrc/")) or name.endswith(".so")]
    assert info["reasons"] == dict.fromkeys(("cpu", "cuda"), "left out: GATEDCONV_BUILD=off")


def test_the_pure_wheel_runs_the_references_where_nothing_may_compile(pure_python, tmp_path):
    told = run_a_layer(pure_python, tmp_path, GATEDCONV_BUILD="off")
    assert told["source"] == "none"
    assert "GATEDCONV_BUILD=off" in told["reason"]
    assert len(told["warned"]) == 1


def test_the_pure_wheel_gives_the_reason_of_a_broken_compiler(pure_python, tmp_path):
    told = run_a_layer(pure_python, tmp_path, CXX="false", GATEDCONV_CACHE=str(tmp_path / "cache"))
    assert told["source"] == "none"
    assert re.search(r"compiled on first use: false .*exit status 1", told["reason"], re.S)
    assert len(told["warned"]) == 1 and told["reason"] in told["warned"][0]
    variables = {"CXX": "no-such-compiler", "GATEDCONV_CACHE": str(tmp_path / "cache")}
    done = run([str(pure_python), "-m", "gatedconv", "env"], tmp_path, **variables)
    assert "no C++ compiler: tried no-such-compiler" in done.stdout, done.stderr


def test_the_pure_wheel_compiles_on_first_use(pure_python, project, tmp_path):
    cache = tmp_path / "cache"
    if (project / "build/objects").is_dir():
        (cache / "objects").parent.mkdir()
        (cache / "objects").symlink_to(project / "build/objects")
    told = run_a_layer(pure_python, tmp_path, GATEDCONV_CACHE=str(cache))
    assert told["source"] == "jit" and told["warned"] == []
    (library,) = cache.glob("*/_C_cpu.so")
    changed = library.stat().st_mtime_ns
    assert run_a_layer(pure_python, tmp_path, GATEDCONV_CACHE=str(cache), CXX="false")["source"] == "jit"
    assert library.stat().st_mtime_ns == changed, "compiled again"


def test_a_wheel_built_with_torch_contains_a_library_that_runs(project, tmp_path):
    done = build_wheel(project, tmp_path / "dist", GATEDCONV_BUILD="require", FORCE_CUDA="0")
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert re.search(r"-py3-none-linux_\w+\.whl$", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        assert "gatedconv/_C_cpu.so" in archive.namelist()
        info = json.loads(archive.read("gatedconv/_build_info.json"))
    assert info["reasons"] == {"cuda": "left out: FORCE_CUDA=0"}
    python = install(wheel, tmp_path / "venv")
    assert run_a_layer(python, tmp_path, CXX="false")["source"] == "ahead-of-time"
    examples = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1:])
    done = run([str(python), "-c", README.format(examples=examples)], tmp_path, CXX="false")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("mode", ["auto", "require"])
def test_a_compiler_that_fails_stops_only_a_required_build(project, tmp_path, mode):
    done = build_wheel(project, tmp_path / "dist", GATEDCONV_BUILD=mode, CXX="false", FORCE_CUDA="0")
    if mode == "require":
        assert done.returncode != 0
        assert "exit status 1" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        info = json.loads(archive.read("gatedconv/_build_info.json"))
    assert "exit status 1" in info["reasons"]["cpu"]


def test_an_unknown_build_mode_is_refused(project, tmp_path):
    done = build_wheel(project, tmp_path / "dist", GATEDCONV_BUILD="maybe")
    assert done.returncode != 0
    assert "GATEDCONV_BUILD: expected auto, off or require, got 'maybe'" in done.stderr
