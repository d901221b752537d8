"""Real architectures: a few in every run, all of docs/models.md with GATEDCONV_ARCHITECTURES=all."""

from __future__ import annotations

import os

import pytest

from tests.convert.architectures import KEPT, ROOT, SECTIONS, examine, kept, written
from tests.convert.zoo import NAMED, TASKS, drawn
from tests.tolerances import OF_TWO_IMAGES

QUICK = ("torchvision/resnet18", "torchvision/shufflenet_v2_x1_0", "timm/lcnet_050")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED if os.environ.get("GATEDCONV_ARCHITECTURES") == "all" else QUICK)
def test_an_architecture_is_gated_trained_compacted_and_exact(name):
    pytest.importorskip(name.split("/")[0])
    row = examine(name, onnx=name == QUICK[0], train=True)
    assert not row.failures
    assert row.ok and row.trained, row
    assert row.gates >= 13 and row.reach > 0.6 and row.removed["0.3"] > row.removed["0.7"] > 0.15
    assert row.onnx is None or row.onnx <= OF_TWO_IMAGES
    assert row.engine is not None and row.engine <= OF_TWO_IMAGES


def test_the_tables_of_the_documents_are_those_of_the_rows_that_are_kept():
    page = ROOT / "docs" / "models.md"
    assert written(page.read_text()) == page.read_text(), "run python -m tests.convert.architectures --write"


def test_nearly_every_network_is_exact():
    rows = {file: list(kept(KEPT / f"{file}.jsonl").values()) for file, _ in SECTIONS}
    assert {row.name for row in rows["named"]} <= set(NAMED) and {row.name for row in rows["tasks"]} <= set(TASKS)
    for found in rows.values():
        assert sum(row.ok for row in found) >= 0.95 * len(found)
        assert all(row.failures for row in found if not row.ok)  # each with its reason
        assert all(row.kept or row.left or row.failures for row in found)
        exact = [row for row in found if not row.failures]
        assert all(error <= OF_TWO_IMAGES for row in exact for error in (row.onnx, row.engine) if error is not None)


def test_a_draw_is_always_the_same_and_a_longer_one_begins_with_it(monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.setattr("tests.convert.zoo._parameters", lambda name: 0 if "5" in name else 10**9)
    few = drawn(6, seed=0)
    assert few == drawn(6, seed=0) and drawn(9, seed=0)[:6] == few and drawn(6, seed=1) != few
    assert len({timm_family(name) for name in few}) == 6


def timm_family(name):
    import timm

    return timm.model_entrypoint(name.removeprefix("timm/")).__module__
