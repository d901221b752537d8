import subprocess
import sys
from pathlib import Path

import pytest

from gatedconv import _build
from tests.packaging.conftest import ROOT, run


def make_toolkit(root: Path, version: str = "13.0") -> Path:
    """Make a folder that looks like a CUDA toolkit."""
    for folder in ("bin", "include", "lib64"):
        (root / folder).mkdir(parents=True)
    (root / "include/cuda_runtime.h").touch()
    (root / "lib64/libcudart.so").touch()
    nvcc = root / "bin/nvcc"
    dryrun, told = f'echo "#\\$ TOP={root}/bin/.." >&2', f'echo "release {version}, V"'
    nvcc.write_text(f'#!/bin/sh\ncase "$*" in *dryrun*) {dryrun};; *) {told};; esac\n')
    nvcc.chmod(0o755)
    return root


@pytest.fixture
def no_toolkit(monkeypatch, tmp_path):
    for name in ("CUDA_HOME", "CUDA_PATH", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "path").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:/usr/bin:/bin")
    return tmp_path


def test_the_toolkit_behind_a_wrapper_script_is_found(no_toolkit):
    home = make_toolkit(no_toolkit / "cuda")
    wrapper = no_toolkit / "path/nvcc"
    wrapper.write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    wrapper.chmod(0o755)
    assert _build.find_toolkit() == _build.Toolkit(home, "13.0")


def test_cuda_home_wins_and_a_broken_one_is_named(no_toolkit, monkeypatch):
    home = make_toolkit(no_toolkit / "cuda", "12.8")
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert _build.find_toolkit().version == "12.8"
    (home / "lib64/libcudart.so").unlink()
    with pytest.raises(_build.BuildError, match=str(home)):
        _build.find_toolkit()


def test_a_toolkit_of_another_major_version_is_refused(no_toolkit, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(no_toolkit / "cuda", "12.8")))
    monkeypatch.setenv("FORCE_CUDA", "1")
    torch = _build.Torch(Path("/torch"), "2.15.0", "13.2")
    with pytest.raises(_build.BuildError, match=r"nvcc 12\.8 .* CUDA 13\.2"):
        _build.check_cuda(torch)
    assert _build.check_cuda(_build.Torch(Path("/torch"), "2.15.0", "12.6")).version == "12.8"
    with pytest.raises(_build.BuildError, match="without CUDA"):
        _build.check_cuda(_build.Torch(Path("/torch"), "2.15.0+cpu", None))


def test_without_a_visible_gpu_cuda_is_built_only_on_request(no_toolkit, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(no_toolkit / "cuda")))
    torch = _build.Torch(Path("/torch"), "2.15.0", "13.2")
    with pytest.raises(_build.BuildError, match="no GPU is visible; install with FORCE_CUDA=1"):
        _build.check_cuda(torch)
    smi = no_toolkit / "path/nvidia-smi"
    smi.write_text("#!/bin/sh\necho 8.6\n")
    smi.chmod(0o755)
    assert _build.check_cuda(torch).version == "13.0"
    monkeypatch.setenv("FORCE_CUDA", "0")
    with pytest.raises(_build.BuildError, match="left out: FORCE_CUDA=0"):
        _build.check_cuda(torch)


def test_compilers_run_in_parallel_as_cores_and_memory_allow(monkeypatch):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr(_build.os, "sched_getaffinity", lambda pid: set(range(8)))
    pages = {"SC_PAGE_SIZE": 4096, "SC_AVPHYS_PAGES": 3 * _build.BYTES_PER_JOB // 4096}
    monkeypatch.setattr(_build.os, "sysconf", pages.__getitem__)
    assert _build.parallel_jobs(16) == 3 and _build.parallel_jobs(2) == 2
    pages["SC_AVPHYS_PAGES"] = 1
    assert _build.parallel_jobs(16) == 1
    monkeypatch.setenv("MAX_JOBS", "5")
    assert _build.parallel_jobs(16) == 5
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(_build.BuildError, match="MAX_JOBS: expected a positive integer, got 'many'"):
        _build.parallel_jobs(16)


def test_a_build_reports_each_file(tmp_path):
    csrc = tmp_path / "csrc"
    csrc.mkdir()
    for name in ("a", "b"):
        (csrc / f"{name}.cpp").write_text(f'extern "C" int {name}() {{ return 1; }}\n')
    lines = []
    _build.build("cpu", csrc, tmp_path / "_C_cpu.so", tmp_path / "objects", lines.append)
    assert sorted(line.split(",")[0] for line in lines) == [f"cpu library: compiled {i} of 2" for i in (1, 2)]


def test_architecture_list(no_toolkit, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;9.0+PTX 9.0a")
    flags = " ".join(_build.architecture_flags())
    assert flags == (
        "-gencode arch=compute_75,code=sm_75 -gencode arch=compute_90,code=[sm_90,compute_90] "
        "-gencode arch=compute_90a,code=sm_90a"
    )
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(_build.BuildError, match="got 'Hopper'"):
        _build.architecture_flags()


def test_instruction_set_flags_go_to_their_files_alone_and_only_on_x86(tmp_path, monkeypatch):
    for name in ("library.cpp", "cpu/conv.cpp", "cpu/conv_avx2.cpp", "cpu/conv_avx512.cpp", "cuda/conv.cu"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(_build.platform, "machine", lambda: "aarch64")
    assert [path.name for path in _build.source_files(tmp_path, "cpu")] == ["conv.cpp", "library.cpp"]
    monkeypatch.setattr(_build.platform, "machine", lambda: "x86_64")
    torch = _build.Torch(Path("/torch"), "2.15.0", None)
    flags = {
        path.name: [flag for flag in _build._compile_command(path, tmp_path, torch, "c++", None) if flag[:2] == "-m"]
        for path in _build.source_files(tmp_path, "cpu")
    }
    assert flags["library.cpp"] == flags["conv.cpp"] == []
    assert flags["conv_avx2.cpp"] == ["-mavx2", "-mfma"]
    assert {"-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"} <= set(flags["conv_avx512.cpp"])


def test_torch_is_found_from_within_an_isolated_build():
    # -S takes site-packages away, as pip's build isolation does.
    code = (
        "import importlib.util, sys; assert importlib.util.find_spec('torch') is None;"
        f"s = importlib.util.spec_from_file_location('b', {str(ROOT / 'gatedconv/_build.py')!r});"
        "b = importlib.util.module_from_spec(s); sys.modules['b'] = b; "
        "s.loader.exec_module(b); print(b.find_torch())"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    import torch

    assert done.returncode == 0, done.stderr
    assert torch.__version__ in done.stdout and str(Path(torch.__file__).parent) in done.stdout


def test_an_old_torch_is_refused(tmp_path, monkeypatch):
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "version.py").write_text("__version__ = '2.10.0+cpu'\ncuda: Optional[str] = None\n")

    class Spec:
        origin = str(package / "__init__.py")

    monkeypatch.setattr(_build.importlib.util, "find_spec", lambda name: Spec)
    with pytest.raises(_build.BuildError, match=r"torch 2\.10\.0\+cpu is older than 2\.11"):
        _build.find_torch()


def test_a_compile_error_names_the_file_and_leaves_no_library(tmp_path):
    csrc, output = tmp_path / "csrc", tmp_path / "out/_C_cpu.so"
    csrc.mkdir()
    (csrc / "broken.cpp").write_text("int f( { return 0; }\n")
    with pytest.raises(_build.BuildError, match=r"broken\.cpp"):
        _build.build("cpu", csrc, output, tmp_path / "objects")
    assert not output.exists() and not list((tmp_path / "objects").iterdir())


def test_an_undefined_symbol_fails_the_build(tmp_path):
    csrc = tmp_path / "csrc"
    csrc.mkdir()
    (csrc / "library.cpp").write_text('void nobody(); extern "C" void f() { nobody(); }\n')
    with pytest.raises(_build.BuildError, match="nobody"):
        _build.build("cpu", csrc, tmp_path / "_C_cpu.so", tmp_path / "objects")


def test_only_what_changed_is_compiled_again(tmp_path):
    csrc, objects = tmp_path / "csrc", tmp_path / "objects"
    csrc.mkdir()
    for name in ("a", "b"):
        (csrc / f"{name}.cpp").write_text(f'extern "C" int {name}() {{ return 1; }}\n')
    _build.build("cpu", csrc, tmp_path / "_C_cpu.so", objects)
    first = {path.name for path in objects.iterdir()}
    (csrc / "a.cpp").write_text('extern "C" int a() { return 2; }\n')
    _build.build("cpu", csrc, tmp_path / "_C_cpu.so", objects)
    added = {path.name for path in objects.iterdir()} - first
    assert len(first) == 2 and len(added) == 1 and added.pop().startswith("a-")


def test_a_library_names_its_sources_without_the_folders_above(tmp_path):
    csrc = tmp_path / "csrc"
    csrc.mkdir()
    (csrc / "a.h").write_text("inline const char* b() { return __FILE__; }\n")
    visible = 'extern "C" __attribute__((visibility("default"))) const char*'
    (csrc / "a.cpp").write_text(
        f'#include "a.h"\n{visible} a() {{ return __FILE__; }}\n{visible} c() {{ return b(); }}\n'
    )
    _build.build("cpu", csrc, tmp_path / "_C_cpu.so", tmp_path / "objects")
    library = (tmp_path / "_C_cpu.so").read_bytes()
    assert b"csrc/a.cpp" in library and b"csrc/a.h" in library
    assert str(tmp_path).encode() not in library


def test_nvcc_hands_the_names_of_sources_on_unless_it_would_split_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    torch, toolkit = _build.Torch(Path("/torch"), "2.15.0", "13.0"), _build.Toolkit(Path("/cuda"), "13.0")
    for folder, passed in (("plain", True), ("with, comma", False)):
        csrc = tmp_path / folder / "csrc"
        command = _build._compile_command(csrc / "k.cu", csrc, torch, "c++", toolkit)
        flag = f"-ffile-prefix-map={csrc}=csrc"
        assert (flag in command) is passed
        assert not passed or command[command.index(flag) - 1] == "-Xcompiler"


def test_the_bare_name_of_the_kernels_is_refused():
    done = run([sys.executable, "-c", "import kernels"], ROOT)
    assert done.returncode != 0 and "import this package as gatedconv.kernels" in done.stderr
