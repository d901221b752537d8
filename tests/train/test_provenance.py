"""The commit of a result, also of a copy without its history."""

from __future__ import annotations

import subprocess

import pytest

from gatedconv.train import provenance


def test_without_git_the_environment_tells_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_git", lambda *_: None)
    monkeypatch.delenv("GATEDCONV_COMMIT", raising=False)
    assert provenance.commit() is None
    monkeypatch.setenv("GATEDCONV_COMMIT", "0123abc")
    assert provenance.commit() == "0123abc"


def test_what_git_says_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        pytest.skip("not a git checkout")
    monkeypatch.setenv("GATEDCONV_COMMIT", "0123abc")
    found = provenance.commit()
    assert found is not None and found.removesuffix("+changes") == head.stdout.strip()
