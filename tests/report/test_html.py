"""The page about runs: complete, self-contained, escaped, and drawn by a browser."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from gatedconv.cli import main
from gatedconv.report.html import RunView, html_page
from gatedconv.report.svg import Point, heat_map, scatter

ROOT = Path(__file__).resolve().parents[2]
EVIL = "<script>alert('x')</script>&\"'"
SUMMARY: dict[str, Any] = {
    "dense": {"top1": 93.0, "macs": 41_000_000, "params": 272_000, "latency_ms": {"1": 3.1, "32": 46.9}},
    "frozen": {
        "top1": 92.5,
        "macs": 20_000_000,
        "params": 150_000,
        "latency_ms": {"1": 1.6, "32": 20.0},
        "engine_latency_ms": {"1": 0.41},
        "energy_j": {"1": 0.0123, "32": None},
    },
    "agreement": 0.9987,
    "energy_j": 12345.6,
    "energy_source": "GPU 0 (NVML)",
    "blocks": [
        {"block": "layer1.0", "open": 7, "channels": 16, "runs": True, "macs": 3_000_000, "ms": 0.21},
        {"block": "layer1.1", "open": 0, "channels": 16, "runs": False, "macs": 0, "ms": None},
        {"block": EVIL, "open": None, "channels": None, "runs": False, "macs": 0, "ms": None},
    ],
    "versions": {"torch": "2.x"},
    "commit": "abc",
    "device": EVIL,
    "threads": 2,
}
HISTORY = [
    {"epoch": epoch, "phase": "gated", "gate_open_rates": {"layer1.0.channel_gate": 1 / epoch, EVIL: 0.5}}
    for epoch in (1, 2, 3)
]


class Page(HTMLParser):
    """What a page holds: tags, text outside of style, and what would be fetched."""

    VOID = {"meta", "link", "img", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [str(value) for key, value in attributes if key in ("src", "href", "srcset", "data", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def full() -> RunView:
    return RunView(f"run {EVIL}", {"lr": 0.1, "name": EVIL}, HISTORY, SUMMARY)


def test_a_page_has_everything_and_makes_no_request() -> None:
    text = html_page([full()])
    page = Page(text)
    assert page.fetched == [] and "script" not in page.tags and "url(" not in text and "@import" not in text
    for shown in (
        "93.00",
        "41.00",
        "20.00",
        "272.0",
        "1.600",
        "0.410",
        "0.0123",
        "12,346 J",
        "GPU 0 (NVML)",
        "99.87%",
        "7 of 16",
        "0 of 16",
        "removed",
        "3.00",
        "0.210",
        "torch",
        "2.x",
        "abc",
        "lr",
    ):
        assert shown in page.text, shown
    assert page.text.count(EVIL) >= 6  # as text, wherever a run can put words
    assert text.count("<rect") == 6 and "50.0% open" in page.text


def test_a_heat_map_shades_from_closed_to_open() -> None:
    picture = ElementTree.fromstring(heat_map({"a": [0.0, 1.0], "b": [0.5, float("nan")]}, [1, 2]))
    fills = [rect.get("fill") for rect in picture.iter("rect")]
    assert fills[0] == "#f1f1f1" and fills[1] == "#0b5d56" and fills[3] == "#fecaca"
    assert len(set(fills)) == 4


def test_points_are_at_their_numbers() -> None:
    points = [Point(10, 90, "dense", "a"), Point(20, 95, "compact", "b"), Point(float("nan"), 1, "dense", "c")]
    picture = ElementTree.fromstring(scatter(points, "x", "y"))
    first, second = picture.iter("circle")
    assert float(second.get("cx") or 0) > float(first.get("cx") or 0)
    assert float(second.get("cy") or 0) < float(first.get("cy") or 0)
    assert "No run has both" in scatter(points[2:], "x", "y")
    assert "circle" in scatter([Point(0, 0, "dense", "zero")], "x", "y")


def test_controls_have_marks_of_their_own_and_points_their_names() -> None:
    """A control trains a part of the network alone: its network is "dense", its config tells which control it is."""
    figures = {"dense": {"top1": 91.0, "macs": 20_000_000, "params": 150_000}}
    runs = [
        RunView("runs/dense-seed0", {"subnetwork": ""}, (), figures),
        RunView("runs/even-seed0", {"subnetwork": "even"}, (), figures),
        RunView("runs/fixed-seed0", {"subnetwork": "runs/gated-seed0/consensus.json"}, (), figures),
    ]
    plain = html_page([full(), runs[0]])
    assert "control" not in plain
    page = html_page(runs)
    for kind in ("dense", "control: equal MACs", "control: fixed at epoch 0"):
        assert re.search(f"</svg>{kind}</span>", page), kind  # in the legend
        assert page.count(f"<th>{kind}</th>") == 1
    picture = ElementTree.fromstring(re.search(r"<svg viewBox.*?</svg>", page, re.DOTALL)[0])  # type: ignore[index]
    marks = {mark.find("title").text.split(":")[0]: mark for mark in picture if mark.find("title") is not None}  # type: ignore[union-attr]
    looks = {(mark.tag, mark.get("fill")) for mark in marks.values()}
    assert len(looks) == 3, looks
    names = [text.text for text in picture.iter("text")]
    assert {"dense-seed0", "even-seed0", "fixed-seed0"} <= set(names)


def test_names_of_points_do_not_overlap_or_leave_the_picture() -> None:
    points = [Point(20.0, 90.0 + 0.01 * number, "dense", "", f"a-run-of-some-name-seed{number}") for number in range(6)]
    picture = ElementTree.fromstring(scatter([*points, Point(1.0, 80.0, "dense", "", "low")], "x", "y"))
    texts = [text for text in picture.iter("text") if (text.text or "").startswith("a-run")]
    lines = sorted(float(text.get("y") or 0) for text in texts)
    assert len(lines) == 6 and all(b - a >= 9.9 for a, b in zip(lines, lines[1:], strict=False))
    assert all(0 < float(text.get("x") or 0) and float(text.get("x") or 0) + 5 * 23 < 520 for text in texts)


@pytest.mark.parametrize(
    "summary",
    [
        None,
        {},
        {"frozen": {"top1": 1.0, "macs": None, "params": None}},
        {"dense": 3, "blocks": 7 * [None]},
        {"frozen": {"top1": 90.0, "macs": 5, "latency_ms": None, "energy_j": 3.0}, "versions": 3, "energy_j": None},
        {"blocks": [{"block": None}]},
        {"blocks": 3},
        {"blocks": "abc"},
        {"agreement": "all"},
        {"blocks": [{"block": 1, "macs": "many", "ms": [], "channels": {}, "open": None}, {"macs": float("nan")}]},
        {"frozen": {"top1": 1.0, "macs": "x", "params": {}, "energy_j_image": "y", "latency_ms": {"1": "z"}}},
    ],
    ids=str,
)
def test_whatever_is_missing_the_page_is_complete(summary: Any) -> None:
    page = Page(html_page([RunView("half", {}, (), summary, ["lost"])]))
    assert "lost" in page.text
    if summary is not None:
        assert "not measurable here" in page.text and " 0 J" not in page.text


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """A finished run of the results, one that is not finished, a broken one, and none at all."""
    folders = [tmp_path / name for name in ("whole", "partial", "broken", "missing")]
    for folder in folders[:3]:
        shutil.copytree(ROOT / "results" / "demo", folder)
    (folders[1] / "summary.json").unlink()
    (folders[2] / "summary.json").write_text("{")
    (folders[2] / "metrics.jsonl").write_text("{\n{}\n")
    return folders


def test_broken_and_partial_runs_are_on_the_page_with_the_reason(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out" / "page.html"
    assert main(["report", "html", *map(str, runs), "--out", str(output)]) == 0
    assert f"written: {output}" in capsys.readouterr().out
    text = Page(output.read_text()).text
    assert "not finished after" in text and "--resume" in text
    assert "summary.json: expected JSON" in text and "line 1 is damaged" in text
    assert "missing: expected a run folder with config.toml, found none" in text
    assert f"{json.loads((runs[0] / 'summary.json').read_text())['frozen']['top1']:.2f}" in text


def test_a_page_about_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "page.html"
    assert main(["report", "html", str(tmp_path / "none"), "--out", str(output)]) == 2
    assert "expected a run folder" in capsys.readouterr().err and not output.exists()
    assert main(["report", "html"]) == 2
    assert "the following arguments are required: RUN" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--out", "x.html"]) == 2
    assert "unrecognized arguments: --out x.html" in capsys.readouterr().err


def chromium(*arguments: str) -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on this machine")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,1800"]
    done = subprocess.run([found, *flags, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_browser_draws_the_page(tmp_path: Path) -> None:
    """The picture shows both plots and the heat map: their colors are there, in numbers."""
    np, image = pytest.importorskip("numpy"), pytest.importorskip("PIL.Image")
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    view = copy.deepcopy(full())
    page.write_text(html_page([view, RunView("other", {}, HISTORY, SUMMARY)]))
    loaded = chromium("--dump-dom", page.as_uri())
    assert loaded.count("<rect") == 12 and not re.search(r"<script", loaded)
    chromium(f"--screenshot={picture}", page.as_uri())
    pixels = np.asarray(image.open(picture).convert("RGB")).reshape(-1, 3)
    assert len(pixels) == 1200 * 1800
    for color in ((11, 93, 86), (15, 118, 110)):  # an open gate; bars of what is left
        assert (abs(pixels.astype(int) - color).max(axis=1) <= 4).sum() > 300, color
