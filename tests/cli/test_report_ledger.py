"""`gatedconv report tables | plots | list` on ledgers and folders that are not as they should be."""

from __future__ import annotations

from pathlib import Path

import pytest

from gatedconv.cli import main
from gatedconv.report.ledger import append_row
from tests.report.ledger_rows import row


def test_a_missing_file_of_epochs_is_named_and_no_disk_is_blamed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    append_row(tmp_path / "ledger.jsonl", row("cpu-r20-c10-dense", 1, kind="dense"))
    assert main(["report", "plots", "--results", str(tmp_path), "--docs", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert str(tmp_path / "epochs" / "cpu-r20-c10-dense-seed1.jsonl") in told and "could not be written" not in told


def test_images_that_cannot_be_written_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    append_row(tmp_path / "ledger.jsonl", row("table1-c10-r56-ours"))
    (tmp_path / "images").write_text("no folder")
    assert main(["report", "plots", "--results", str(tmp_path), "--docs", str(tmp_path)]) == 2
    assert f"{tmp_path / 'images'}: could not be written" in capsys.readouterr().err
