"""The environment report, and the commit of a result in a copy without its history."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

from gatedconv import _native, environment


def test_without_git_the_variable_gives_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_git", lambda *_: None)
    monkeypatch.delenv("GATEDCONV_COMMIT", raising=False)
    assert environment.commit() is None
    monkeypatch.setenv("GATEDCONV_COMMIT", "0123abc")
    assert environment.commit() == "0123abc"


def test_the_commit_of_git_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        pytest.skip("not a git checkout")
    monkeypatch.setenv("GATEDCONV_COMMIT", "0123abc")
    found = environment.commit()
    assert found is not None and found.removesuffix("+changes") == head.stdout.strip()


def test_the_report_has_versions_cpu_and_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"model name": "a cpu", "flags": "fpu avx2 fma avx512f avx512_bf16 sse"}
    monkeypatch.setattr(environment, "cpu_info", flags.get)
    found = environment.collect()
    assert (found["torch"], found["cpu.threads"]) == (torch.__version__, torch.get_num_threads())
    assert found["cpu.features"] == ["avx2", "fma", "avx512f", "avx512_bf16"]
    assert found["packages.numpy"] == environment.version("numpy") and "triton" in found
    json.dumps(found)


def test_a_missing_cuda_library_has_a_reason_and_a_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {target: _native.Library(target, "none", None, f"no {target}") for target in ("cpu", "cuda")}
    monkeypatch.setattr(_native, "load", missing.__getitem__)
    found = environment.collect()
    assert (found["native.cuda.reason"], found["native.cpu.reason"]) == ("no cuda", "no cpu")
    assert "FORCE_CUDA=1" in found["native.cuda.get"] and "nvcc" in found["native.cuda.get"]


def test_versions_are_those_installed() -> None:
    assert environment.versions("no-such-package") == environment.versions()
    assert environment.versions()["torch"] == environment.version("torch")
