import ctypes
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gatedconv import _build, _native
from gatedconv.environment import collect
from tests.packaging.conftest import run


@pytest.fixture
def fresh(monkeypatch):
    """Let the loader decide again, without loading anything over what this process holds."""
    monkeypatch.setattr(_native, "_loaded", {})
    monkeypatch.delenv("GATEDCONV_NATIVE", raising=False)
    monkeypatch.delenv("GATEDCONV_BUILD", raising=False)


def _age(path: Path) -> int:
    return path.stat().st_mtime_ns


def undefined_symbols(library: Path) -> set[str]:
    told = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True)
    # Weak ones may stay undefined; @GLIBC and @CXXABI ones belong to the system.
    lines = [line.split() for line in told.stdout.splitlines()]
    return {name for kind, name in lines if kind == "U" and "@GLIBC" not in name and "@CXXABI" not in name}


def weak_functions(path: Path) -> set[str]:
    told = subprocess.run(["nm", "-C", "--defined-only", str(path)], capture_output=True, text=True, check=True)
    symbols = [line.split(maxsplit=2) for line in told.stdout.splitlines()]
    # DW.ref. is a pointer, the same from every unit.
    return {name for _, kind, name in symbols if kind in "WVu" and not name.startswith("DW.ref.")}


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_every_undefined_symbol_is_exported_by_torch_or_cudart(target):
    path = Path(_native.__file__).parent / _build.library_name(target)
    if not path.exists():
        pytest.skip(f"no {target} library here: {_native.build_info().get('reasons', {}).get(target)}")
    folder = Path(torch.__file__).parent / "lib"
    names = ["libtorch_cpu.so", "libc10.so"] + (["libtorch_cuda.so", "libc10_cuda.so"] if target == "cuda" else [])
    exporters = [ctypes.CDLL(str(folder / name)) for name in names] + [ctypes.CDLL("libstdc++.so.6")]
    symbols = {name.split("@")[0] for name in undefined_symbols(path)}
    assert any(name.startswith("aoti_torch_") for name in symbols)
    # cudart's own names, the calls that nvcc adds among them, are found by the link, which allows none
    # undefined.
    ours = {name for name in symbols if not (target == "cuda" and name.startswith(("cuda", "__cuda")))}
    assert {name for name in ours if not any(hasattr(library, name) for library in exporters)} == set()


def test_the_libraries_use_the_stable_abi_alone():
    library = _native.load("cpu")
    assert library.path is not None
    assert "torch_library_impl" in undefined_symbols(library.path)
    foreign = [n for n in undefined_symbols(library.path) if n.startswith(("_ZN2at", "_ZN3c10", "_ZNK3c10", "Py"))]
    assert not foreign


def test_code_for_an_instruction_set_cannot_leak_to_processors_without_it():
    # The linker keeps one copy of an inline function; were it the AVX one, every processor would get it.
    folder = Path(__file__).resolve().parents[2] / "build/objects"
    newest = {path.stem.rsplit("-", 1)[0]: path for path in sorted(folder.glob("*.o"), key=_age)}
    weak = {unit: weak_functions(path) for unit, path in newest.items()}
    special = {unit: unit.rsplit("_", 1)[1] for unit in newest if "_avx" in unit}
    if not special:
        pytest.skip("no objects for a special instruction set")
    for unit, isa in special.items():
        others = set().union(*(names for other, names in weak.items() if special.get(other) != isa))
        # Those of its own types may be: no unit of another instruction set has them.
        shared = {name for name in weak[unit] if name in others or f"gatedconv::{isa}::" not in name}
        assert not shared, f"{unit} shares inline functions: {sorted(shared)[:5]}"


def test_nothing_is_loaded_or_compiled_at_import():
    code = (
        "import sys, torch;"
        "heavy = {'triton', 'fvcore', 'matplotlib', 'sklearn', 'onnx', 'torchvision', 'torch._dynamo'};"
        "of_torch = heavy & set(sys.modules);"
        "import gatedconv, gatedconv._native as n, gatedconv.ops;"
        "assert n._loaded == {}, n._loaded;"
        "assert not torch.cuda.is_initialized();"
        "assert heavy & set(sys.modules) == of_torch, 'gatedconv imports more than torch does'"
    )
    done = run([sys.executable, "-c", code], Path.cwd())
    assert done.returncode == 0, done.stderr


def test_off_means_the_references_without_a_warning(fresh, monkeypatch, recwarn):
    monkeypatch.setenv("GATEDCONV_NATIVE", "off")
    library = _native.load("cpu")
    assert (library.source, library.path, library.reason) == ("none", None, "GATEDCONV_NATIVE=off")
    assert _native.load("cuda").source == "none"
    assert not recwarn.list


def test_an_unknown_wish_is_an_error(fresh, monkeypatch):
    monkeypatch.setenv("GATEDCONV_NATIVE", "fast")
    with pytest.raises(ValueError, match="expected auto, aot, jit or off, got 'fast'"):
        _native.load("cpu")


def test_a_library_older_than_its_sources_is_not_used(fresh, monkeypatch):
    monkeypatch.setenv("GATEDCONV_NATIVE", "aot")
    monkeypatch.setattr(_native, "build_info", lambda: {"source_hash": "of long ago"})
    monkeypatch.setattr(Path, "exists", lambda self: True)
    with pytest.warns(RuntimeWarning, match="older than its sources"):
        assert _native.load("cpu").source == "none"


def test_a_failure_is_found_once_and_warned_of_once(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("GATEDCONV_NATIVE", "jit")
    monkeypatch.setenv("GATEDCONV_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    with pytest.warns(RuntimeWarning, match="no native cpu library") as caught:
        first = _native.load("cpu")
        assert _native.load("cpu") is first
    assert len(caught) == 1 and first.reason is not None and "exit status 1" in first.reason
    assert "the cpu library is missing" in str(_native.load("cuda").reason)


def test_a_file_that_is_no_library_is_reported(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("GATEDCONV_NATIVE", "jit")
    (tmp_path / "_C_cpu.so").write_text("not an ELF file")
    monkeypatch.setattr(_native, "_compile", lambda target: tmp_path / "_C_cpu.so")
    with pytest.warns(RuntimeWarning, match="does not load"):
        assert not _native.load("cpu").available


def test_threads_that_call_first_together_load_once(fresh, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    calls = []
    monkeypatch.setattr(
        _native, "_load_first", lambda target: calls.append(target) or _native.Library(target, "none", None, "test")
    )
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(_native.load, ["cpu"] * 32))
    assert len(found) == 1 and calls == ["cpu"]


def test_processes_that_need_a_library_together_build_it_once(fresh, monkeypatch, tmp_path):
    import time
    from concurrent.futures import ThreadPoolExecutor

    builds = []

    def build(target, csrc, output, cache, progress):
        builds.append(target)
        time.sleep(0.2)
        output.write_text("")

    monkeypatch.setenv("GATEDCONV_CACHE", str(tmp_path))
    monkeypatch.setattr(_build, "build", build)
    # Without the lock within a process that `load` takes: a file's lock is another for each that opens it.
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(_native._compile, ["cpu"] * 4))
    assert len(paths) == 1 and builds == ["cpu"]


def test_the_report_names_versions_libraries_and_reasons():
    found = collect()
    json.dumps(found)
    assert found["packages.torch"] and torch.__version__.startswith(found["packages.torch"].split("+")[0])
    assert found["native.cpu.source"] in ("ahead-of-time", "jit", "none")
    assert (found["native.cpu.path"] is None) == (found["native.cpu.source"] == "none")
    assert found["native.cuda.source"] != "none" or found["native.cuda.reason"]
