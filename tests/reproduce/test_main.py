"""`python -m reproduce tables | plots | list` on damaged ledgers and missing folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from reproduce.__main__ import main
from reproduce.ledger import append_row
from tests.reproduce.ledger_rows import row


def test_a_missing_file_of_epochs_is_named_and_no_disk_is_blamed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    append_row(tmp_path / "ledger.jsonl", row("cpu-r20-c10-dense", 1, kind="dense"))
    assert main(["plots", "--results", str(tmp_path), "--docs", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert str(tmp_path / "epochs" / "cpu-r20-c10-dense-seed1.jsonl") in told and "could not be written" not in told


def test_images_that_cannot_be_written_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    append_row(tmp_path / "ledger.jsonl", row("table1-c10-r56-ours"))
    (tmp_path / "images").write_text("no folder")
    assert main(["plots", "--results", str(tmp_path), "--docs", str(tmp_path)]) == 2
    assert f"{tmp_path / 'images'}: could not be written" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["tables", "plots"])
def test_a_folder_of_results_that_is_not_there_writes_nothing(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, nowhere = tmp_path / "results.md", tmp_path / "nowhere"
    page.write_text("<!-- experiments: begin, written by docs/write.py -->\nkept\n<!-- experiments: end -->\n")
    assert main([what, "--results", str(nowhere), "--docs", str(tmp_path)]) == 2
    assert f"{nowhere}: expected the folder of the ledger, found none" in capsys.readouterr().err
    assert "kept" in page.read_text() and list(tmp_path.iterdir()) == [page]


def test_the_list_names_rows_that_do_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for each in (row(), row(seed=1, kind="dense"), row(seed=2, recipe="old")):
        append_row(tmp_path / "ledger.jsonl", each)
    assert main(["list", "--results", str(tmp_path)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("headline-r56-c10 ")]
    assert line.endswith("1 of 5, 1 of kind dense (not gated), 1 by an earlier recipe")
