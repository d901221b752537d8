"""Builds the native libraries: one list of sources and flags for installing, for ``make`` and for first use.

setup.py loads this file by its path, and ``python gatedconv/_build.py`` runs it as a program, so it imports only
the standard library. Of the installed torch it needs the folder and the version file, and never imports it.

The libraries use PyTorch's stable ABI and no Python symbol, so one compiled file serves every Python
and every torch from 2.11 on. Objects are cached by the hash of their sources and flags: a changed source rebuilds
its own object, and two processes that build at once write the same bytes (each to a file of its own, then
renamed).

Variables: GATEDCONV_BUILD=auto (default) builds what this machine can build and records the reason for the rest;
``off`` builds nothing; ``require`` fails where something cannot be built. The CUDA library is built where a GPU is
visible, for that GPU; FORCE_CUDA=1 builds it without one, for TORCH_CUDA_ARCH_LIST or all supported architectures;
FORCE_CUDA=0 never builds it. MAX_JOBS limits the number of compilers.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

TARGETS = ("cpu", "cuda")

# The library of the package gatedconv-runtime, which needs no torch: the target "plan".
PLAN_SOURCES = (
    "bf16_x86 gatedconv_plan plan plan_avx2 plan_avx512 plan_bands plan_decode plan_file plan_header "
    "plan_portable plan_schedule plan_weights worker_pool"
).split()

# torch 2.11, in the encoding of torch/headeronly/version.h: the oldest torch whose stable ABI the sources may
# use.
TORCH_TARGET_VERSION = "0x020b000000000000"

# PyTorch's own headers require C++20 since 2.13; the older ones accept it.
CXX_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
NVCC_FLAGS = ("-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-DUSE_CUDA")

# A file whose name ends so is compiled for that instruction set, on x86-64 only, and reached through run-time
# dispatch.
ISA_FLAGS: Mapping[str, tuple[str, ...]] = {
    "_avx2": ("-mavx2", "-mfma"),
    "_avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma"),
}

CUDA_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0+PTX")

# Memory set aside for each compiler. Measured: 0.28 GB (g++ 12, csrc/cpu/plan_avx512.cpp); nvcc's is not measured.
BYTES_PER_JOB = 2 * 2**30


class BuildError(RuntimeError):
    """A library cannot be built here; the message, for the user, gives the reason."""


@dataclass(frozen=True)
class Torch:
    """What a build needs of an installed torch."""

    root: Path
    version: str
    cuda: str | None


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: its folder and the version of its nvcc."""

    root: Path
    version: str


def library_name(target: str) -> str:
    """Return the file name of the library for ``target`` ("cpu" or "cuda")."""
    return f"_C_{target}.so"


def find_torch() -> Torch:
    """Find the torch of this environment without importing it.

    Under pip's build isolation this process cannot see it, but ``sys.executable -I`` can: the isolation is
    only a ``PYTHONPATH``, which ``-I`` ignores.

    Raises:
        BuildError: No torch, or one older than 2.11.
    """
    spec = importlib.util.find_spec("torch")
    origin = spec.origin if spec else None
    if origin is None:
        question = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s else '')"
        answer = subprocess.run([sys.executable, "-I", "-c", question], capture_output=True, text=True)
        origin = answer.stdout.strip()
    if not origin:
        raise BuildError(f"torch is not installed for {sys.executable}: install it, then install gatedconv again")
    root = Path(origin).parent
    text = (root / "version.py").read_text()
    version = re.search(r"^__version__ *=.*?['\"](.+?)['\"]", text, re.M)
    cuda = re.search(r"^cuda\b.*?= *['\"](.+?)['\"]", text, re.M)
    if version is None:
        raise BuildError(f"{root / 'version.py'} names no version")
    number = tuple(int(part) for part in version[1].split(".")[:2])
    if number < (2, 11):
        raise BuildError(f"torch {version[1]} is older than 2.11, the oldest whose stable ABI serves")
    return Torch(root, version[1], cuda[1] if cuda else None)


def find_toolkit() -> Toolkit:
    """Find a CUDA toolkit: CUDA_HOME, CUDA_PATH, the home of the nvcc on PATH, or /usr/local/cuda.

    The nvcc on PATH may be a wrapper script, whose folder is no toolkit; ``--dryrun`` prints that of the real one.

    Raises:
        BuildError: None of them holds nvcc, the headers and the run-time library.
    """
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [Path(named)] if named else []
    on_path = shutil.which("nvcc")
    if not named and on_path:
        answer = subprocess.run([on_path, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.+)$", answer.stderr + answer.stdout, re.M)
        if top:
            candidates.append(Path(top[1].strip()).resolve())
        candidates.append(Path(on_path).resolve().parent.parent)
    if not named:
        candidates.append(Path("/usr/local/cuda"))
    for root in candidates:
        if (root / "bin/nvcc").exists() and (root / "include/cuda_runtime.h").exists() and _cudart_folder(root):
            answer = subprocess.run([str(root / "bin/nvcc"), "--version"], capture_output=True, text=True)
            version = re.search(r"release (\d+\.\d+)", answer.stdout)
            if version:
                return Toolkit(root, version[1])
    raise BuildError(
        "no CUDA toolkit (bin/nvcc, include/cuda_runtime.h and lib64/libcudart.so) in: "
        + (", ".join(str(path) for path in candidates) or "CUDA_HOME, PATH")
    )


def check_cuda(torch: Torch) -> Toolkit:
    """Return the toolkit that can build the CUDA library for ``torch``.

    Raises:
        BuildError: FORCE_CUDA=0, no visible GPU without FORCE_CUDA=1, a torch without CUDA, no toolkit, or a
            toolkit of another major version.
    """
    if os.environ.get("FORCE_CUDA") == "0":
        raise BuildError("left out: FORCE_CUDA=0")
    if os.environ.get("FORCE_CUDA") != "1" and not _visible_architectures():
        raise BuildError("no GPU is visible; install with FORCE_CUDA=1 to build it for another machine")
    if torch.cuda is None:
        raise BuildError(f"torch {torch.version} is built without CUDA")
    toolkit = find_toolkit()
    if toolkit.version.split(".")[0] != torch.cuda.split(".")[0]:
        raise BuildError(
            f"nvcc {toolkit.version} in {toolkit.root} and CUDA {torch.cuda} of torch differ in major version"
        )
    return toolkit


def find_compiler() -> str:
    """Return the C++ compiler: ``CXX``, else c++, g++ or clang++ of PATH.

    Raises:
        BuildError: There is none.
    """
    named = os.environ.get("CXX")
    names = [named] if named else ["c++", "g++", "clang++"]
    for name in names:
        # CXX may carry a launcher or options ("ccache g++").
        if shutil.which(shlex.split(name)[0]):
            return name
    raise BuildError(f"no C++ compiler: tried {', '.join(names)}")


def source_files(csrc: Path, target: str, *, any_machine: bool = False) -> list[Path]:
    """List the sources of a library, leaving out those for another processor unless `any_machine`."""
    if target == "cuda":
        return sorted([*csrc.glob("cuda/**/*.cu"), *csrc.glob("cuda/**/*.cpp")])
    if target == "plan":
        files = [csrc / "cpu" / f"{name}.cpp" for name in PLAN_SOURCES]
    else:
        files = [*csrc.glob("*.cpp"), *csrc.glob("cpu/**/*.cpp"), *csrc.glob("shared/**/*.cpp")]
    x86 = any_machine or platform.machine().lower() in ("x86_64", "amd64")
    return sorted(file for file in files if x86 or not _isa_flags(file))


def source_hash(csrc: Path) -> str:
    """Hash every file below ``csrc`` and this one: two equal hashes give equal libraries."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for file in sorted(csrc.rglob("*")):
        if file.suffix in (".cpp", ".cu", ".h", ".cuh"):
            digest.update(f"\0{file.relative_to(csrc)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def build(
    target: str, csrc: Path, output: Path, cache: Path, progress: Callable[[str], None] = lambda text: None
) -> None:
    """Compile and link the library for ``target`` from ``csrc`` into the file ``output``.

    Args:
        target: "cpu", "cuda" or "plan".
        csrc: Folder of the sources.
        output: The library file to write; written to a temporary file, then renamed.
        cache: Folder that keeps the objects between builds.
        progress: Called with a line of text for each finished object.

    Raises:
        BuildError: Something is missing here, or a command failed; the message names it.
    """
    if sys.platform == "win32":
        raise BuildError("the native libraries are not built on Windows")
    torch = find_torch() if target != "plan" else None
    compiler = find_compiler()
    toolkit = check_cuda(torch) if torch and target == "cuda" else None
    sources = source_files(csrc, target)
    if not sources:
        raise BuildError(f"no sources for {target} in {csrc}")
    headers = b"".join(file.read_bytes() for file in sorted(csrc.rglob("*.h")) + sorted(csrc.rglob("*.cuh")))
    # Of the whole command, which may begin with a launcher; nvcc calls the other compiler.
    commands = [shlex.split(compiler), *([[_nvcc(toolkit)]] if toolkit is not None else [])]
    versions = "".join(map(_compiler_version, commands))
    count, counting = 0, threading.Lock()

    def compile_one(source: Path) -> Path:
        command = _compile_command(source, csrc, torch, compiler, toolkit)
        # The folder of the sources is not part of the key: an installed copy shares objects with a checkout.
        key = "\0".join(command).replace(str(csrc), "csrc") + versions
        digest = hashlib.sha256(key.encode() + headers + source.read_bytes())
        finished = cache / f"{source.stem}-{digest.hexdigest()[:16]}.o"
        compiled = not finished.exists()
        if compiled:
            _run_into(finished, command)
        nonlocal count
        with counting:
            count += 1
            done = f"{'compiled' if compiled else 'cached'} {count} of {len(sources)}"
            progress(f"{target} library: {done}, {source.name}")
        return finished

    with concurrent.futures.ThreadPoolExecutor(parallel_jobs(len(sources))) as pool:
        objects = list(pool.map(compile_one, sources))
    _link(objects, output, torch, compiler, toolkit)


def parallel_jobs(most: int) -> int:
    """Return how many compilers may run at once: MAX_JOBS, else what the cores and the free memory allow, at least 1.

    Raises:
        BuildError: MAX_JOBS is no positive integer.
    """
    named = os.environ.get("MAX_JOBS")
    if named:
        if not named.isdecimal() or int(named) < 1:
            raise BuildError(f"MAX_JOBS: expected a positive integer, got {named!r}")
        return int(named)
    try:
        cores = len(os.sched_getaffinity(0))
        memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on macOS
        cores, memory = os.cpu_count() or 1, BYTES_PER_JOB
    return max(1, min(most, cores, memory // BYTES_PER_JOB))


def build_all(
    csrc: Path, cache: Path, output: Callable[[str], Path], progress: Callable[[str], None] = lambda text: None
) -> dict[str, str]:
    """Build every library that this machine can build, following GATEDCONV_BUILD.

    Args:
        csrc: Folder of the sources.
        cache: Folder that keeps the objects between builds.
        output: Returns the library file to write for a target.
        progress: Called with a line of text for each step.

    Returns:
        Target to reason, for each library that was not built.

    Raises:
        BuildError: GATEDCONV_BUILD has an unknown value, or is "require" and a library cannot be built.
    """
    mode, reasons = build_mode(), {}
    for target in TARGETS:
        try:
            if mode == "off":
                raise BuildError("left out: GATEDCONV_BUILD=off")
            if target == "cuda":
                check_cuda(find_torch())
            build(target, csrc, output(target), cache, progress)
        except BuildError as error:
            wanted = target == "cpu" or os.environ.get("FORCE_CUDA") == "1"
            if mode == "require" and wanted:
                raise
            reasons[target] = str(error)
            progress(f"{target} library: not built: {error}")
    return reasons


def build_mode() -> str:
    """Return GATEDCONV_BUILD: "auto", "off" or "require".

    Raises:
        BuildError: It is something else.
    """
    mode = os.environ.get("GATEDCONV_BUILD", "auto")
    if mode not in ("auto", "off", "require"):
        raise BuildError(f"GATEDCONV_BUILD: expected auto, off or require, got {mode!r}")
    return mode


def write_build_info(folder: Path, csrc: Path, reasons: Mapping[str, str]) -> None:
    """Record in ``folder`` what ``gatedconv env`` prints of a build; libraries that were not built are removed."""
    try:
        torch: str | None = find_torch().version
    except BuildError:
        torch = None
    for target in reasons:
        (folder / library_name(target)).unlink(missing_ok=True)
    info = {"source_hash": source_hash(csrc), "torch": torch, "reasons": dict(reasons)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")


def main() -> int:
    """Build the libraries of this checkout in place and print each step."""
    package = Path(__file__).resolve().parent
    csrc, cache = package.parent / "csrc", package.parent / "build" / "objects"
    try:
        reasons = build_all(
            csrc, cache, lambda target: package / library_name(target), lambda text: print(text, flush=True)
        )
        write_build_info(package, csrc, reasons)
    except (BuildError, OSError) as error:
        print(f"gatedconv: {error}", file=sys.stderr)
        return 1
    return 0


def _isa_flags(source: Path) -> tuple[str, ...]:
    return next((flags for suffix, flags in ISA_FLAGS.items() if source.stem.endswith(suffix)), ())


def _cudart_folder(root: Path) -> Path | None:
    folders = [root / "lib64", root / "lib", root / f"targets/{platform.machine()}-linux/lib"]
    return next((folder for folder in folders if any(folder.glob("libcudart.so*"))), None)


def _compile_command(
    source: Path, csrc: Path, torch: Torch | None, compiler: str, toolkit: Toolkit | None
) -> list[str]:
    common = ["-c", str(source), f"-I{csrc}"]
    # Error messages contain names of source files, without the folders of this machine.
    names = [f"-ffile-prefix-map={csrc}=csrc"]
    # What needs no torch is compiled without it: its object is the same one in every library.
    if torch is not None and (source.suffix == ".cu" or b"<torch/" in source.read_bytes()):
        common += ["-isystem", str(torch.root / "include"), f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
        names.append(f"-ffile-prefix-map={torch.root}=torch")
    if toolkit is not None:
        common += ["-isystem", str(toolkit.root / "include")]
    if source.suffix == ".cu" and toolkit is not None:
        return [_nvcc(toolkit), *NVCC_FLAGS, *architecture_flags(), *_for_host(names), *common]
    extra = shlex.split(os.environ.get("CXXFLAGS", ""))
    return [*shlex.split(compiler), *CXX_FLAGS, *_isa_flags(source), *names, *extra, *common]


def _for_host(flags: list[str]) -> list[str]:
    # For nvcc a comma or a blank ends what is passed on.
    return [part for flag in flags if not re.search(r"[,\s]", flag) for part in ("-Xcompiler", flag)]


def architecture_flags() -> list[str]:
    """Return nvcc's ``-gencode`` flags: TORCH_CUDA_ARCH_LIST, else the visible devices, else ours.

    Raises:
        BuildError: TORCH_CUDA_ARCH_LIST holds something that is no compute capability.
    """
    named = re.split(r"[;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    flags = []
    for entry in [name for name in named if name] or _visible_architectures() or CUDA_ARCHITECTURES:
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", entry)
        if match is None:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: expected entries such as 9.0 or 9.0+PTX, got {entry!r}")
        number = match[1] + match[2]
        code = f"[sm_{number},compute_{number}]" if match[3] else f"sm_{number}"
        flags += ["-gencode", f"arch=compute_{number},code={code}"]
    return flags


def _visible_architectures() -> list[str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=compute_cap", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True)
    return sorted(set(re.findall(r"^\d+\.\d+$", answer.stdout, re.M))) if answer.returncode == 0 else []


def _compiler_version(command: list[str]) -> str:
    return subprocess.run([*command, "--version"], capture_output=True, text=True).stdout


def _nvcc(toolkit: Toolkit) -> str:
    return str(toolkit.root / "bin/nvcc")


def _link(objects: list[Path], output: Path, torch: Torch | None, compiler: str, toolkit: Toolkit | None) -> None:
    command = [*shlex.split(compiler), "-shared", *map(str, objects)]
    if torch is not None:
        command += [f"-L{torch.root / 'lib'}", "-ltorch_cpu"]
    else:  # stripped, and needing nothing but the C library
        command += ["-s", "-pthread", "-static-libgcc", "-static-libstdc++"]
    if sys.platform == "linux":
        # A symbol that torch does not export fails here and not in the user's process.
        command.append("-Wl,-z,defs")
    if toolkit is not None:
        command += ["-ltorch_cuda", f"-L{_cudart_folder(toolkit.root)}", "-lcudart"]
    _run_into(output, [*command, *shlex.split(os.environ.get("LDFLAGS", ""))])


def _run_into(output: Path, command: list[str]) -> None:
    """Run ``command`` with ``-o`` to a temporary file next to ``output``, then rename: never a half-written file."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".build-") as folder:
        part = Path(folder) / output.name
        try:
            done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
        except OSError as error:
            raise BuildError(f"{shlex.join(command)}\n{error}") from error
        if done.returncode != 0:
            raise BuildError(f"{shlex.join(command)}\nexit status {done.returncode}\n{done.stderr.strip()[-4000:]}")
        os.replace(part, output)


if __name__ == "__main__":
    sys.exit(main())
