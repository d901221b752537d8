"""`-m slow` runs a few cases of every kernel, `-m ptx_all` the full matrix and all mutations.

With GATEDCONV_PTX_LEDGER=1 what ran is kept for the table of the documents (tests/ptx/ledger.py).
"""

from __future__ import annotations

import os

import pytest
import torch

from tests.ptx.ledger import Ledger


def pytest_collection_modifyitems(config, items):
    """The full matrix takes an hour: it runs only where it is asked for."""
    for item in items:
        if item.get_closest_marker("ptx_all"):
            item.add_marker(pytest.mark.timeout(1800))
    if "ptx_all" in config.getoption("markexpr"):
        return
    left_out = [item for item in items if item.get_closest_marker("ptx_all")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def ledger():
    """What ran in this session."""
    made = Ledger()
    yield made
    if os.environ.get("GATEDCONV_PTX_LEDGER"):
        made.save()


@pytest.fixture(autouse=True)
def one_thread():
    """Runs are compared with PyTorch on small tensors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
