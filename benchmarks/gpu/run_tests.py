"""Runs pytest as it is: on a checkout that need not be installed, with no plugin but pytest itself.

``python -m benchmarks.gpu.run_tests ARGUMENTS``; with GATEDCONV_SHARD=i/n every n-th test, from the i-th on.
"""

from __future__ import annotations

import os
import sys

import pytest

from benchmarks.gpu.__main__ import prepare
from benchmarks.gpu.session import ROOT


class Shard:
    """Leaves out the tests of the other shards."""

    def __init__(self, text: str) -> None:
        self.index, self.count = map(int, text.split("/"))

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep every n-th test."""
        items[:] = items[self.index :: self.count]


if __name__ == "__main__":
    prepare()
    plain = ["-c", os.devnull, "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    sys.exit(pytest.main([*plain, *sys.argv[1:]], plugins=[Shard(os.environ.get("GATEDCONV_SHARD", "0/1"))]))
