"""`-m slow` runs a few cases of every kernel, `-m ptx_all` the full matrix."""

from __future__ import annotations

import pytest
import torch


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


@pytest.fixture(autouse=True)
def one_thread():
    """Runs are compared with PyTorch on small tensors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
