import json
import platform
import shutil

import pytest

from tests.native.instruction_count import RECORD, compiler_version, count_instructions


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="no valgrind here")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="counts are of x86-64")
def test_no_more_instructions_than_recorded(tmp_path):
    record = json.loads(RECORD.read_text())
    if compiler_version() != record["compiler"]:
        pytest.skip(f"recorded with {record['compiler']}, this is {compiler_version()}")
    counts = count_instructions(tmp_path)
    for isa, recorded in record["instructions"].items():
        # More is a regression; much less wants a new record: python -m tests.native.instruction_count
        assert 0.9 * recorded <= counts[isa] <= 1.02 * recorded
