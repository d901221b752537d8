"""Runs pytest as it is: on a checkout that need not be installed, with no plugin but pytest itself.

``python -m benchmarks.gpu.run_tests ARGUMENTS``
"""

from __future__ import annotations

import os
import sys

import pytest

from benchmarks.gpu.__main__ import prepare
from benchmarks.gpu.session import ROOT

if __name__ == "__main__":
    prepare()
    plain = ["-c", os.devnull, "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    sys.exit(pytest.main([*plain, *sys.argv[1:]]))
