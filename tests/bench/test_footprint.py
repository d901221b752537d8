"""What ships: processes of their own, the file of a run, the panel of the page."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

from gatedconv.bench import footprint
from gatedconv.cli import main
from gatedconv.report.footprint_table import FILE_NAME, read_footprints
from gatedconv.report.html import RunView, html_page

ROW = {
    "runtime": "<b>",
    "version": "1",
    "file": 5_000_000,
    "package": None,
    "import_ms": 1.25,
    "first_ms": 20.5,
    "call_ms": 0.3756,
    "peak_mib": 31.4,
    "note": "",
}


def echo_session(path, x, threads):
    return lambda: x[:, 0] + 1


ECHO = footprint.Runtime("echo", "numpy", ".safetensors", "os", echo_session)


class First(nn.Module):
    """What the stand-in for a runtime computes."""

    def forward(self, x):
        return x[:, 0] + 1


@pytest.fixture
def echo(monkeypatch):
    """One runtime, which needs nothing but NumPy."""
    monkeypatch.setattr(
        footprint, "RUNTIMES", (ECHO, dataclasses.replace(ECHO, name="gone", package="no-such-package"))
    )
    monkeypatch.setattr(footprint, "_write", lambda network, x, path: path.write_bytes(b"1234"))


def test_a_runtime_is_measured_in_its_own_process_and_checked(echo, tmp_path):
    x = torch.zeros(2, 3, 4, 4)
    found, missing = footprint.measure_footprints(First(), x, tmp_path, rounds=1, calls=3)
    assert found.file == 4 and found.package > 1e6 and found.version
    assert 0 < found.import_ms <= found.first_ms and found.call_ms > 0
    assert 5 < found.peak_mib < 200, "the memory of the tests' own process was counted"
    assert missing.runtime == "gone" and missing.peak_mib is None and "no-such-package" in missing.note
    with pytest.raises(RuntimeError, match="echo computes another output"):
        footprint.measure_footprints(nn.Identity(), x, tmp_path, rounds=1, calls=1)


def test_rows_are_read_back_and_damage_is_named(tmp_path):
    path = tmp_path / FILE_NAME
    path.write_text(json.dumps([ROW]))
    assert read_footprints(path) == [ROW]
    for text, words in (("{", "expected JSON"), ("{}", "expected list"), ('[{"runtime": 1}]', "expected str")):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_footprints(path)


def test_the_page_has_a_panel_of_what_ships(tmp_path):
    page = html_page([RunView("run", footprint=[ROW])])
    assert "What you ship" in page and "<td>&lt;b&gt;</td>" in page and "<td>5.00</td><td>-</td><td>31</td>" in page
    assert "What you ship" not in html_page([RunView("run")])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("")
    (tmp_path / "run" / FILE_NAME).write_text(json.dumps([ROW]))
    assert main(["report", "html", str(tmp_path / "run"), "--out", str(tmp_path / "page.html")]) == 0
    assert "What you ship" in (tmp_path / "page.html").read_text()


def test_bench_keeps_the_footprint_with_the_run(echo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gatedconv.cli.saved_networks.load", lambda path: First())
    run = tmp_path / "run"
    run.mkdir()
    (run / "compact.safetensors").touch()
    assert main(["bench", str(run), "--footprint", "--rounds", "1", "--batch", "1"]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "echo" in printed and "not measured: gone" in printed
    assert [row["runtime"] for row in read_footprints(run / FILE_NAME)] == ["echo", "gone"]
