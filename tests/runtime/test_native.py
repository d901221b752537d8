"""The library from C: the example, CMake's package, pkg-config, another processor, and the fuzzer's corpus."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import gatedconv
from gatedconv import _build
from tests.runtime.conftest import ROOT, X, require_compiler, small_net
from tests.tolerances import assert_close

EXAMPLE = ROOT / "runtime/examples/classify.c"
CC = ["cc", "-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror"]


def run(*command: object, cwd: Path | None = None, **options: object) -> str:
    """Run a command that has to succeed; returns what it prints."""
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


def require(*tools: str) -> None:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


@pytest.fixture
def files(plan_bytes, tmp_path):
    """A plan and an image, as the example reads them."""
    (tmp_path / "net.plan").write_bytes(plan_bytes)
    (tmp_path / "image.f32").write_bytes(X[0].numpy().tobytes())
    return [tmp_path / "net.plan", tmp_path / "image.f32"]


def check(printed: str, rt, files) -> None:
    """Compare what the example printed with the package's answer."""
    y = rt.load(files[0])(X[:1].numpy(), threads=1)[0]
    best, score = printed.split()
    assert int(best) == y.argmax() and np.float32(score) == y.max()


def test_the_example_is_short_and_runs(rt, package, files, tmp_path):
    require("cc")
    assert len(EXAMPLE.read_text().splitlines()) <= 40
    library = package / "gatedconv_runtime/libgatedconv_plan.so"
    program = tmp_path / "classify"
    run(*CC, EXAMPLE, f"-I{ROOT / 'csrc/cpu'}", library, f"-Wl,-rpath,{library.parent}", "-o", program)
    check(run(program, *files), rt, files)
    damaged = tmp_path / "bad.plan"
    damaged.write_bytes(files[0].read_bytes()[:-1])
    done = subprocess.run([program, damaged, files[1]], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr == f"classify: {damaged}: the file is cut short\n"


def test_a_plan_runs_on_the_callers_threads(package, files, tmp_path):
    require("cc")
    library = package / "gatedconv_runtime/libgatedconv_plan.so"
    flags = [f"-I{ROOT / 'csrc/cpu'}", library, f"-Wl,-rpath,{library.parent}", "-pthread"]
    run(*CC, "-D_POSIX_C_SOURCE=200809L", ROOT / "tests/runtime/threads.c", *flags, "-o", tmp_path / "threads")
    assert int(run(tmp_path / "threads", files[0])) >= 2 * 4  # a call of each for every batch at least


@pytest.mark.parametrize("threads", [1, 3])
def test_every_request_for_memory_may_fail(package, plan_bytes, tmp_path, threads):
    """One error, no crash, nothing left behind, and the same output afterwards."""
    require("cc")
    library = package / "gatedconv_runtime/libgatedconv_plan.so"
    flags = [f"-I{ROOT / 'csrc/cpu'}", library, f"-Wl,-rpath,{library.parent}"]
    source, program = ROOT / "tests/runtime/no_memory.c", tmp_path / "no_memory"
    compiled = [*CC[:1], "-std=c11", *CC[2:], "-D_POSIX_C_SOURCE=200809L"]
    done = subprocess.run([*compiled, source, *flags, "-o", program], capture_output=True, text=True, check=False)
    if "__libc_malloc" in done.stderr:
        pytest.skip("needs glibc")
    assert done.returncode == 0, done.stderr
    (tmp_path / "net.plan").write_bytes(plan_bytes)
    assert int(run(program, tmp_path / "net.plan", threads)) > 100


def test_the_library_needs_the_c_library_alone_and_shows_its_interface_alone(package):
    require("readelf", "nm")
    library = package / "gatedconv_runtime/libgatedconv_plan.so"
    needed = [line.split("[")[1].rstrip("]") for line in run("readelf", "-d", library).splitlines() if "NEEDED" in line]
    assert {name.split(".so")[0] for name in needed} <= {"libc", "libm", "ld-linux-x86-64", "ld-linux-aarch64"}
    shown = {line.split()[-1] for line in run("nm", "-D", "--defined-only", library).splitlines()}
    header = (ROOT / "csrc/cpu/gatedconv_plan.h").read_text()
    assert {name for name in shown if name.startswith("gatedconv")} == {
        word
        for line in header.splitlines()
        for word in line.replace("(", " ").replace("*", " ").split()
        if "GATEDCONV_PLAN_API" in line and word.startswith("gatedconv_plan_")
    }
    assert not [name for name in shown if "gatedconv" in name and name.startswith("_Z")]


def test_cmake_and_the_fuzzer_list_the_sources_of_the_package():
    text = (ROOT / "runtime/CMakeLists.txt").read_text()
    listed = text.split("set(NAMES ")[1].split(")")[0].split() + text.split("APPEND NAMES ")[1].split(")")[0].split()
    assert set(listed) == set(_build.PLAN_SOURCES)
    fuzzed = (ROOT / "runtime/fuzz/run.sh").read_text().split("/cpu/{")[1].split("}")[0].split(",")
    assert set(fuzzed) == set(_build.PLAN_SOURCES)
    for suffix, flags in _build.ISA_FLAGS.items():
        assert f'plan{suffix}.cpp PROPERTIES COMPILE_OPTIONS "{";".join(flags)}"' in " ".join(text.split())


def test_the_corpus_of_the_fuzzer_opens_and_runs(rt):
    corpus = sorted((ROOT / "runtime/fuzz/corpus").iterdir())
    assert len(corpus) >= 6 and sum(path.stat().st_size for path in corpus) < 200_000
    opened = 0
    for path in corpus:
        try:
            net = rt.load(path)
        except rt.PlanError:
            continue  # found by the fuzzer, which does not compare checksums
        assert np.isfinite(net(np.ones(net.input_size, np.float32), threads=1)).all()
        opened += 1
    assert opened >= 6


@pytest.mark.slow
def test_cmake_and_pkg_config_find_what_was_installed(rt, files, tmp_path):
    require("cmake", "cc", "pkg-config")
    prefix = tmp_path / "prefix"
    run("cmake", "-S", ROOT / "runtime", "-B", tmp_path / "build", f"-DCMAKE_INSTALL_PREFIX={prefix}")
    run("cmake", "--build", tmp_path / "build", "-j", "2")
    run("cmake", "--install", tmp_path / "build")
    (archive,) = prefix.rglob("libgatedconv_plan.a")

    found = {"PKG_CONFIG_PATH": str(archive.parent / "pkgconfig"), "PATH": "/usr/bin:/bin"}
    flags = shlex.split(run("pkg-config", "--cflags", "--libs", "--static", "gatedconv_plan", env=found))
    run(*CC, EXAMPLE, *flags, "-o", tmp_path / "by-pkg-config")
    check(run(tmp_path / "by-pkg-config", *files), rt, files)

    (tmp_path / "app").mkdir()
    (tmp_path / "app/CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.16)\nproject(app C CXX)\nfind_package(gatedconv_plan 0.1 REQUIRED)\n"
        f"add_executable(app {EXAMPLE})\ntarget_link_libraries(app gatedconv_plan::gatedconv_plan)\n"
        "set_target_properties(app PROPERTIES LINKER_LANGUAGE CXX)\n"
    )
    run("cmake", "-S", tmp_path / "app", "-B", tmp_path / "out", f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", tmp_path / "out")
    check(run(tmp_path / "out/app", *files), rt, files)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_wheel_from_the_sdist_runs_with_numpy_alone(plan_bytes, tmp_path):
    """In an environment that holds the wheel and numpy, and nothing else."""
    require_compiler()
    source = tmp_path / "source"
    shutil.copytree(ROOT / "runtime", source / "runtime", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    shutil.copytree(ROOT / "csrc", source / "csrc")
    (source / "gatedconv").mkdir()
    shutil.copy(ROOT / "gatedconv/_build.py", source / "gatedconv")
    call = "from setuptools import build_meta; build_meta.build_{}({!r})"
    run(sys.executable, "-c", call.format("sdist", str(tmp_path)), cwd=source / "runtime")
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert (unpacked / "native/csrc/cpu/plan_avx512.cpp").is_file() and (unpacked / "CMakeLists.txt").is_file()
    run(sys.executable, "-c", call.format("wheel", str(tmp_path)), cwd=unpacked)
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-linux" in wheel.name and wheel.stat().st_size <= 2 << 20
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {f"gatedconv_runtime/{name}" for name in ("__init__.py", "py.typed", "libgatedconv_plan.so")} <= names

    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    run(python, "-m", "pip", "install", "--quiet", "numpy")
    run(python, "-m", "pip", "install", "--quiet", "--no-index", wheel)
    installed = {line.split()[0] for line in run(python, "-m", "pip", "list").splitlines()[2:]}
    assert installed == {"gatedconv-runtime", "numpy", "pip", *({"setuptools"} & installed)}
    (tmp_path / "net.plan").write_bytes(plan_bytes)
    np.save(tmp_path / "x.npy", X.numpy())
    code = "import numpy as np, gatedconv_runtime as rt; np.save('y.npy', rt.load('net.plan')(np.load('x.npy')))"
    run(python, "-c", code, cwd=tmp_path)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), gatedconv.Engine(small_net(), X)(X).numpy())


@pytest.mark.slow
def test_the_portable_kernels_run_on_arm(rt, files, tmp_path, monkeypatch):
    """Cross-compiled and emulated: equal to the portable kernels here but for fused multiply-adds."""
    require("aarch64-linux-gnu-g++", "aarch64-linux-gnu-gcc", "qemu-aarch64")
    objects = []
    for path in _build.source_files(ROOT / "csrc", "plan", any_machine=True):
        if not path.stem.endswith(("_avx2", "_avx512")):
            objects.append(tmp_path / f"{path.stem}.o")
            run("aarch64-linux-gnu-g++", *_build.CXX_FLAGS, f"-I{ROOT / 'csrc'}", "-c", path, "-o", objects[-1])
    run("aarch64-linux-gnu-gcc", "-c", EXAMPLE, f"-I{ROOT / 'csrc/cpu'}", "-o", tmp_path / "classify.o")
    program = tmp_path / "classify"
    run("aarch64-linux-gnu-g++", "-static", tmp_path / "classify.o", *objects, "-o", program, "-pthread")
    best, score = run("qemu-aarch64", program, *files).split()
    monkeypatch.setenv("GATEDCONV_ISA", "portable")
    y = torch.from_numpy(rt.load(files[0])(X[:1].numpy())[0])
    assert int(best) == int(y.argmax())
    assert_close(torch.tensor(float(score)), y.max())
