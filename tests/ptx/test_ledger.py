"""The record of what ran: sessions add up, other sources start anew, lines that have not run are named."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from tests.ptx import ledger
from tests.ptx.parser import parse

TEXT = """
.visible .entry k(.param .u64 p) {
  .reg .b32 %r<4>;
  .loc 1 12 0
  mov.u32 %r1, 1;
  .loc 1 13 5, function_name $L__info_string0, inlined_at 1 12 0
  {ADD} %r2, %r1, 2;
  ret;
}
  .file 1 "/home/me/csrc/shared/conv_tile.h"
"""


def session(path, case, ran, add="add.u32"):
    (kernel,) = parse(TEXT.replace("{ADD}", add)).values()
    made = ledger.Ledger()
    made.add("k", 90, "1x1", case, kernel, np.array(ran), sum(ran))
    made.add_mutation("one barrier left out", "k", "k 3", "race")
    made.save(path)
    return json.loads(path.read_text())


def test_instructions_know_their_lines():
    (kernel,) = parse(TEXT.replace("{ADD}", "add.u32")).values()
    assert [one.source for one in kernel.instructions] == [
        ("shared/conv_tile.h", 12),
        *2 * [("shared/conv_tile.h", 13)],
    ]


def test_sessions_add_up_until_the_sources_change(tmp_path):
    path = tmp_path / "ledger.json"
    session(path, "a", [True, False, False])
    found = session(path, "b", [True, False, True])
    row = ledger.summary(found)["kernels"]["k sm_90"]
    assert row == {"cases": 2, "variants": 1, "executed": 3, "instructions": 3, "covered": 2}
    (line,) = ledger.left_out(found["kernels"]["k sm_90"])
    assert line.split()[:4] == ["shared/conv_tile.h:13", "1", "of", "2"]
    text = ledger.table(ledger.summary(found))
    assert "| k | sm_90 | 2 | 1 | 3 | 67% |" in text and "| one barrier left out | k | 1 | 1 | none |" in text
    changed = session(path, "a", [True, True, False], add="sub.u32")
    assert ledger.summary(changed)["kernels"]["k sm_90"]["cases"] == 1


def test_the_record_has_every_kernel_and_most_of_its_instructions():
    body = json.loads(ledger.RESULTS.read_text())
    cuda = "".join(path.read_text() for path in (ledger.ROOT / "csrc" / "cuda").rglob("*.cu*"))
    named = set(re.findall(r"__global__ void (?:__launch_bounds__\(.*?\)\s+)?(\w+_kernel)\(", cuda))
    assert len(named) == 6 and named <= {key.split()[0] for key in body["kernels"]}
    assert all(row["covered"] >= 0.8 * row["instructions"] for row in body["kernels"].values())
    assert all(one["found"] for one in body["mutations"].values() if one["kind"] == "one mistake in a source")


def test_the_record_has_every_training_kernel():
    pytest.importorskip("triton")
    from tests.ptx.test_training import kernels

    assert kernels() <= {key.split()[0] for key in json.loads(ledger.RESULTS.read_text())["kernels"]}
