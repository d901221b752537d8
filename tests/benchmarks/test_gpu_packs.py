"""Archives between calls: what goes in, what comes out, what is refused; rows of several ledgers; data in parts."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.gpu import data, keep, merge
from benchmarks.gpu.packs import Group, Limits, Piece, find_packs, put_back, read_packs, write_packs
from benchmarks.gpu.rows import joined, ledger_text, rows_of
from gatedconv.train.checkpoint import load_checkpoint, save_checkpoint
from gatedconv.train.config import TrainConfig, to_toml
from reproduce.ledger import LedgerRow, read_ledger
from reproduce.table import all_experiments
from tests.benchmarks.test_gpu_calls import require_brought_back
from tests.reproduce.ledger_rows import row

SMALL = Limits(file_bytes=60_000, files=3, total_bytes=150_000)
KEY = ("headline-r56-c10", 0)


def run(name: str, *sizes: int) -> Group:
    pieces = [Piece(f"runs/{name}/checkpoint/{i}.pt", os.urandom(size), 1e9 + 0.25) for i, size in enumerate(sizes)]
    return Group(name, pieces)


def written(out: Path, groups: list[Group], limits: Limits = SMALL) -> list[str]:
    scratch = out.parent / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    left_out = [each.label for each in write_packs(out, groups, limits, scratch)]
    assert list(scratch.iterdir()) == []
    return left_out


def test_archives_keep_the_limits_and_bring_back_every_byte(tmp_path: Path) -> None:
    """A group is split over archives; what has no room goes in no part, and what is smaller after it does."""
    text = Piece("runs/a/metrics.jsonl", b'{"epoch": 1}\n' * 9000, 2e9)
    runs = [run("a", 30_000, 30_000), run("b", 40_000, 40_000), run("c", 100), run("d", 70_000)]
    groups = [Group("text", [text]), *runs]
    assert written(tmp_path / "out", groups) == ["b", "d"]
    packs = sorted((tmp_path / "out").iterdir())
    assert len(packs) <= 3 and all(path.stat().st_size <= 60_000 for path in packs)
    pieces, notes = read_packs(packs)
    assert notes == ["b: had no room in the archives", "d: had no room in the archives"]
    assert set(pieces.values()) == {text, *groups[1].pieces, *groups[3].pieces}
    assert written(tmp_path / "out", [run("a", 100)]) == []
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["pack-0.tar"]


def test_the_real_limits_are_those_of_the_machine(tmp_path: Path) -> None:
    groups = [run(f"{i}", 14_500_000, 1_000_000) for i in range(5)]
    assert written(tmp_path / "out", groups, Limits()) == ["3", "4"]
    require_brought_back(tmp_path / "out")


def test_newer_files_stay(tmp_path: Path) -> None:
    old, new = (Piece("runs/a/config.toml", content, 1e9 + at) for at, content in enumerate((b"old", b"new")))
    for pieces, found in (([old], b"old"), ([new], b"new"), ([old], b"new")):
        put_back(tmp_path, pieces)
        assert (tmp_path / "runs/a/config.toml").read_bytes() == found
    assert [path.name for path in (tmp_path / "runs/a").iterdir()] == ["config.toml"]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize(("name", "more"), [("metrics.jsonl", b"{}\n" * 9), ("summary.json", b"{}")])
def test_of_two_states_of_a_run_the_further_one_comes_back_whole(
    name: str, more: bytes, order: tuple[int, int], tmp_path: Path
) -> None:
    """Whichever is read first, and though the other was written later: two that went on from the same archives."""

    def state(number: int, changes: dict[str, bytes]) -> list[Piece]:
        files = {"metrics.jsonl": b"{}\n" * 8, "config.toml": b"", "checkpoint/gated.pt": bytes(number), **changes}
        return [Piece(f"runs/a/{place}", content, 1e9 + number) for place, content in files.items()]

    states = state(1, {name: more}), state(2, {})
    for each in order:
        put_back(tmp_path, [*states[each], Piece(f"runs/b/checkpoint/{each}.pt", b"", 1e9)])
    for piece in states[0]:
        path = tmp_path / piece.name
        assert (path.read_bytes(), path.stat().st_mtime) == (piece.content, piece.changed)
    assert len(list((tmp_path / "runs/b/checkpoint").iterdir())) == 1  # as far as the one that came first


@pytest.mark.parametrize("files", [1, 2, 3])
def test_a_run_whose_coming_back_was_cut_off_comes_back_at_the_next_call(
    files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("metrics.jsonl", "summary.json", "checkpoint/gated.pt", "config.toml")
    old, new = ([Piece(f"runs/a/{name}", content, 1e9) for name in names] for content in (b"{}\n", b"{}\n{}\n"))
    put_back(tmp_path, old)
    done, replace = [], os.replace

    def replacing(source: Path, target: Path) -> None:
        if len(done) == files:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", replacing)
    with pytest.raises(KeyboardInterrupt):
        put_back(tmp_path, new)
    monkeypatch.undo()
    put_back(tmp_path, new)
    assert all((tmp_path / piece.name).read_bytes() == piece.content for piece in new)


def test_folders_of_several_calls_are_several_calls(tmp_path: Path) -> None:
    """However they are named; archives given singly, too, belong with those beside them."""
    for name, runs in (("a", [run("a", 40_000), run("b", 40_000)]), ("deep/b", [run("c", 100)])):
        written(tmp_path / "out" / name, runs)
    first, second = tmp_path / "out" / "a", tmp_path / "out" / "deep" / "b"
    calls = [[first / "pack-0.tar", first / "pack-1.tar"], [second / "pack-0.tar"]]
    assert find_packs([tmp_path / "out"]) == calls == find_packs([first, second]) == find_packs([first, first.parent])
    assert find_packs([calls[0][1], calls[1][0], calls[0][0]]) == calls


@pytest.mark.parametrize("damage", ["missing", "cut off", "other"])
def test_a_run_that_lacks_a_file_is_left_out_and_named(tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out"
    assert written(out, [run("a", 30_000), run("b", 40_000), run("c", 100)]) == []
    (hit,) = [path for path in out.iterdir() if b"runs/b" in path.read_bytes() and path.name != "pack-0.tar"]
    content = hit.read_bytes()
    hit.write_bytes(content[:2000] if damage == "cut off" else b"x" * 2000)
    if damage == "missing":
        hit.unlink()
    ((packs),) = find_packs([out])
    pieces, notes = read_packs(packs)
    assert {name.split("/")[1] for name in pieces} == {"a", "c"}
    assert notes[-1] == "runs/b: lacks 0.pt, and is left out"
    assert damage == "missing" or f"{hit}: a damaged archive" in notes[0]


def test_archives_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected archives pack-\*.tar, found none"):
        find_packs([tmp_path])
    with pytest.raises(ValueError, match="nowhere: expected a folder of archives or an archive, found nothing there"):
        find_packs([tmp_path / "nowhere"])
    written(tmp_path / "out", [run("a", 40_000), run("b", 40_000)])
    ((first, second),) = find_packs([tmp_path / "out"])
    with pytest.raises(ValueError, match="expected pack-0.tar with index.json; found pack-1.tar"):
        read_packs([second])
    for content in (first.read_bytes()[:700], b"", b"x" * 2000):
        first.write_bytes(content)
        with pytest.raises(ValueError, match=r"expected pack-0.tar with index.json; .*a damaged archive .*\Z"):
            read_packs([first, second])


@pytest.mark.parametrize("name", ["../escape", "/etc/escape", "runs/../../escape", "elsewhere/file", "runs"])
def test_files_that_would_lie_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / "pack-0.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(ValueError, match="expected files of runs and results, found"):
        read_packs([tmp_path / "pack-0.tar"])


def fill(work: Path, name: str, *files: str) -> None:
    for each in ("config.toml", *files):
        path = work / "runs" / f"{name}-seed0" / each
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_toml(TrainConfig()) if each == "config.toml" else each)


def test_what_the_next_call_needs_is_kept_and_nothing_else(tmp_path: Path) -> None:
    dense, other, begun = "table1-c10-r56-dense", "headline-r56-c10-dense", "headline-r56-c10"
    models = ("metrics.jsonl", "summary.json", "dense.safetensors", "compact.onnx", "checkpoint/dense.pt")
    fill(tmp_path, dense, *models)
    fill(tmp_path, other, *models, "plots/a.svg")
    fill(tmp_path, begun, "metrics.jsonl", "consensus.json", "checkpoint/gated.pt", "checkpoint/cut.previous.pt")
    fill(tmp_path, begun, "checkpoint/gated.previous.pt", "tensorboard/events")
    fill(tmp_path, "table6-c10-r110-lambda-0", "metrics.jsonl")  # without a checkpoint there is nothing to go on from
    old, new = row("headline-r56-c10-equal-macs"), row(dense)
    (tmp_path / "results" / "epochs").mkdir(parents=True)
    for each in (old, new):
        (tmp_path / "results" / "epochs" / f"{each.experiment}-seed0.jsonl").write_text("{}\n")
    (tmp_path / "results" / "ledger.jsonl").write_bytes(ledger_text([old, new]))
    found = {group.label: group.pieces for group in keep.groups(tmp_path, {old.key: old})}
    names = {label: sorted(piece.name.rpartition("seed0/")[2] for piece in pieces) for label, pieces in found.items()}
    assert names == {
        "rows of the ledger": [f"results/epochs/{dense}-seed0.jsonl", "results/ledger.jsonl"],
        f"{dense}-seed0": ["config.toml", "dense.safetensors", "metrics.jsonl", "summary.json"],
        f"{other}-seed0": ["config.toml", "metrics.jsonl", "summary.json"],
        f"{begun}-seed0": [
            "checkpoint/cut.pt", "checkpoint/gated.pt", "config.toml", "consensus.json", "metrics.jsonl",
        ],
    }  # fmt: skip
    pieces = {piece.name: piece for group in found.values() for piece in group}
    assert rows_of(pieces, tmp_path) == {new.key: new}
    assert pieces[f"runs/{begun}-seed0/checkpoint/cut.pt"].content == b"checkpoint/cut.previous.pt"
    assert pieces[f"runs/{begun}-seed0/checkpoint/gated.pt"].content == b"checkpoint/gated.pt"
    # Weights are of no more use once every naive row that is made from them is there.
    made = {(name, 0): new for name, each in all_experiments().items() if each.needs == dense}
    assert made and not keep._weights_needed(f"{dense}-seed0", made)


@pytest.mark.parametrize("cut", [True, False])
def test_what_only_another_step_would_need_is_left_out_after_a_cut(tmp_path: Path, cut: bool) -> None:
    """And comes back as the run needs it; before the cut, nothing is left out."""
    work, name = tmp_path / "work", "runs/headline-r56-c10-seed0/checkpoint"
    fill(work, "headline-r56-c10", "metrics.jsonl")

    def state(number: float) -> dict[str, Any]:
        parts = {each: {"weight": torch.full((10_000,), number)} for each in ("model", "teacher")}
        groups = [{"lr": 0.1, "params": [0]}]
        return {**parts, "optimizer": {"state": {0: {"momentum_buffer": torch.ones(10_000)}}, "param_groups": groups}}

    save_checkpoint(work / name / "gated.pt", state(1.0))
    if cut:
        save_checkpoint(work / name / "cut.pt", state(2.0))
    written(tmp_path / "out", list(keep.groups(work, {})), Limits())
    pieces, _ = read_packs(find_packs([tmp_path / "out"])[0])
    assert (len(pieces[f"{name}/gated.pt"].content) < 50_000) == cut
    keep.unpacked(tmp_path / "later", pieces.values())
    found = load_checkpoint(tmp_path / "later" / name / "gated.pt")
    assert float(found["model"]["weight"].mean()) == 1.0 and found["optimizer"]["param_groups"][0]["lr"] == 0.1
    assert float(found["teacher"]["weight"].mean()) == (2.0 if cut else 1.0)
    assert len(found["optimizer"]["state"]) == (0 if cut else 1)
    assert sorted(path.name for path in (work / name).iterdir()) == ["cut.pt"] * cut + ["gated.pt"]
    assert sorted(path.name for path in (tmp_path / "later" / name).iterdir()) == ["cut.pt"] * cut + ["gated.pt"]


def test_runs_that_are_furthest_come_first(tmp_path: Path) -> None:
    for name, epochs in (("table3-c10-r110-1fc-after", 3), ("headline-r56-c10", 1), ("table1-c10-r56-ours", 9)):
        fill(tmp_path, name, "checkpoint/gated.pt")
        (tmp_path / "runs" / f"{name}-seed0" / "metrics.jsonl").write_text("{}\n" * epochs)
    order = [group.label for group in keep.groups(tmp_path, {})][1:]
    assert [name.split("-")[0] for name in order] == ["table1", "table3", "headline"]


def brought(out: Path, *rows: LedgerRow, epochs: bytes = b'{"epoch": 1}\n') -> Path:
    names = [f"results/epochs/{each.experiment}-seed{each.seed}.jsonl" for each in rows]
    kept = [Piece(f"results/consensus/{each.experiment}-seed{each.seed}.json", b"{}", 1e9) for each in rows]
    ledger = Piece("results/ledger.jsonl", ledger_text(rows), 1e9)
    written(out, [Group("rows", [ledger, *(Piece(name, epochs, 1e9) for name in names), *kept])])
    return out


def test_merging_adds_what_is_new_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results"
    first, second = brought(tmp_path / "a", row()), brought(tmp_path / "b", row(), row(seed=1))
    arguments = [str(first), str(second), "--results", str(results)]
    assert merge.main(arguments) == 0
    assert capsys.readouterr().out == (
        "headline-r56-c10 seed 0: added, top-1 93.50\nheadline-r56-c10 seed 1: added, top-1 93.50\n"
    )
    assert list(read_ledger(results / "ledger.jsonl").values()) == [row(), row(seed=1)]
    assert (results / "epochs" / "headline-r56-c10-seed1.jsonl").read_bytes() == b'{"epoch": 1}\n'
    assert (results / "consensus" / "headline-r56-c10-seed0.json").read_bytes() == b"{}"
    before = {path: path.read_bytes() for path in results.rglob("*.json*")}
    assert merge.main(arguments) == 0 and capsys.readouterr().out == "nothing new\n"
    assert {path: path.read_bytes() for path in results.rglob("*.json*")} == before
    # What is measured later completes a row, and is not taken away by an archive from before.
    third = brought(tmp_path / "c", row(energy_j_image=0.5))
    for place, told in ((third, "headline-r56-c10 seed 0: joules of an image added\n"), (first, "nothing new\n")):
        assert merge.main([str(place), "--results", str(results)]) == 0 and capsys.readouterr().out == told
        assert read_ledger(results / "ledger.jsonl")[KEY].energy_j_image == 0.5


def test_merging_a_folder_of_calls_takes_the_rows_of_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results"
    for seed in (0, 1):
        brought(tmp_path / "calls" / str(seed), row(seed=seed))
    assert merge.main([str(tmp_path / "calls"), "--results", str(results)]) == 0
    assert capsys.readouterr().out.count("added") == len(list((results / "epochs").iterdir())) == 2
    assert list(read_ledger(results / "ledger.jsonl").values()) == [row(), row(seed=1)]


@pytest.mark.parametrize(
    ("other", "epochs", "message"),
    [
        (row(top1_last=94.0), b'{"epoch": 1}\n', "top1_last is 94.0 and 93.5; remove one of them"),
        (row(commit="abc"), b'{"epoch": 1}\n', "commit is 'abc' and None; remove one of them"),
        (row(), b'{"epoch": 2}\n', "headline-r56-c10-seed0.jsonl: another run than that of the archives"),
    ],
)
def test_another_row_of_a_run_is_refused_and_nothing_written(
    other: LedgerRow, epochs: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    assert merge.main([str(brought(tmp_path / "a", row())), "--results", str(results)]) == 0
    before = {path: path.read_bytes() for path in results.rglob("*.json*")}
    capsys.readouterr()
    place = brought(tmp_path / "b", row(seed=3), other, epochs=epochs)
    assert merge.main([str(place), "--results", str(results)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("gpu: merge: ") and message in told and len(told.splitlines()) == 1
    assert {path: path.read_bytes() for path in results.rglob("*.json*")} == before


def test_two_archives_that_differ_are_refused_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="headline-r56-c10, seed 0: b has another row than a: macs is 5.0 and 6000"):
        joined([("a", {KEY: row()}), ("b", {KEY: row(macs=5.0)})])


@pytest.mark.parametrize("arguments", [[], ["--results"], ["--what", "a"], ["nowhere"]])
def test_merging_nothing_is_told_in_a_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert merge.main(arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


class Parts:
    """A data set of two train sheets, the second of which is not full, and a test sheet: easy to compress."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        values = np.arange(2 * data.PER_SHEET, dtype=np.uint32) % 251
        tiles = np.zeros((2 * data.PER_SHEET, 32, 32, 3), np.uint8)
        tiles[:, 3, 5] = np.stack([values, values // 2, 255 - values], 1).astype(np.uint8)
        self.images = {"train-00": tiles[:2500], "train-01": tiles[2500:], "test-00": tiles[7:2507]}
        self.labels = {"train": np.arange(2600) % 3, "test": np.arange(2500) % 3}

    def part(self, number: int, *names: str, name: str = "easy") -> Path:
        place = self.folder / f"part{number}" / name
        place.mkdir(parents=True)
        for each in names:
            if each in self.images:
                rows = self.images[each].reshape(50, 50, 32, 32, 3)
                sheet = np.concatenate([np.concatenate(list(line), axis=1) for line in rows], axis=0)
                Image.fromarray(sheet).save(place / f"{each}.webp", lossless=True, quality=0)
            elif each == "classes":
                (place / "classes.txt").write_text("sea lion\nb\nc\n\n")
            else:
                np.save(place / f"{each}-labels.npy", self.labels[each])
        return place.parent


def test_a_data_set_arrives_in_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sheet by sheet in any order, from a folder of the set or one above; complete only when labels say so."""
    parts, store = Parts(tmp_path), tmp_path / "store"
    environment = {"STORE": str(store)}
    first = parts.part(1, "train-01", "test")
    assert data.main({**environment, "DATA": str(first)}) == 0
    assert capsys.readouterr().out == "easy: still missing train-labels.npy, classes.txt, test-00.webp\n"
    assert data.main({**environment, "DATA": str(parts.part(2, "train", "classes") / "easy")}) == 0
    assert capsys.readouterr().out == "easy: still missing train-00.webp, test-00.webp\n"
    assert data.found_sources(store) == {}
    assert data.main({**environment, "DATA": str(parts.part(3, "train-00", "test-00"))}) == 0
    assert capsys.readouterr().out == f"easy: complete, 2600 train and 2500 test images in {store / 'easy.npz'}\n"
    assert data.found_sources(store) == {"easy": f"npz:{store / 'easy.npz'}"}
    with np.load(store / "easy.npz") as archive:
        images = np.concatenate([parts.images["train-00"], parts.images["train-01"]])[:2600]
        assert np.array_equal(archive["train_images"], images) and images.dtype == archive["train_images"].dtype
        assert np.array_equal(archive["test_images"], parts.images["test-00"])
        assert np.array_equal(archive["train_labels"], parts.labels["train"])
        assert list(archive["class_names"]) == ["sea lion", "b", "c"]
    assert not [path for path in store.rglob("*") if "partial" in path.name]


def test_parts_that_are_damaged_or_of_another_set_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts, store = Parts(tmp_path), tmp_path / "store"
    whole = ("train-00", "train-01", "test-00", "train", "test", "classes")
    place = parts.part(1, *whole)
    sheet = place / "easy" / "train-00.webp"
    content = sheet.read_bytes()
    for damaged, told in (
        (content[: len(content) // 2], "train-00.webp: expected a sheet of images, could not read it"),
        (b"text", "train-00.webp: expected a sheet of images, could not read it"),
    ):
        sheet.write_bytes(damaged)
        assert data.main({"STORE": str(store), "DATA": str(place)}) == 2
        assert told in capsys.readouterr().err and not (store / "easy.npz").exists()
    Image.new("RGB", (64, 32)).save(sheet)
    with pytest.raises(ValueError, match="expected 1600 x 1600 pixels, found 64 x 32"):
        data.collect(place, store)
    other = parts.part(2, *whole, name="cifar10")
    with pytest.raises(ValueError, match=r"cifar10: expected images of mean \(0.4914, .*: other sheets"):
        data.collect(other, store)
    (other / "cifar10" / "test-labels.npy").write_bytes(b"no labels")
    with pytest.raises(ValueError, match="test-labels.npy: expected labels as .npy, could not read it"):
        data.collect(other, store)
    assert data.found_sources(store) == {}


@pytest.mark.parametrize("place", ["", "nowhere", "empty"])
def test_no_parts_are_told_in_a_line(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert data.main({"STORE": str(tmp_path), "DATA": str(tmp_path / place) if place else ""}) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
