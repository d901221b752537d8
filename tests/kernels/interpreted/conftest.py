"""These tests run the kernels: natively on a GPU, else under the interpreter in a process of their own.

``test_interpreter.py`` starts that process. Triton reads TRITON_INTERPRET when it is imported, so one process
has one kind of kernel.
"""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def device():
    return torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # both runs of a network in real fp32
