"""Images that stay in their files: the same batches as from memory, whoever decodes them."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gatedconv.data import DataError, EvalBatches, ImageData, TrainBatches, load_data
from gatedconv.data.batches import share
from gatedconv.data.image_data import validation_view
from gatedconv.data.image_files import FileImages

image = pytest.importorskip("PIL.Image")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for split, count in (("train", 11), ("test", 5)):
        for label in ("ape", "bee"):
            (tmp_path / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 255, (10 + number, 12, 3), dtype=np.uint8)
                image.fromarray(pixels).save(tmp_path / split / label / f"{number}.png")
    return tmp_path


def both(folder: Path, workers: int) -> tuple[ImageData, ImageData]:
    source = f"imagefolder:{folder}"
    return load_data(source, image_size=8), load_data(source, image_size=8, workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_batches_are_those_from_memory(folder: Path, workers: int) -> None:
    memory, files = both(folder, workers)
    assert isinstance(files.train_images, FileImages) and files.image_shape == memory.image_shape == (3, 8, 8)
    assert files.mean == memory.mean and files.std == memory.std
    before = torch.get_rng_state()
    for _ in range(2):
        for left, right in ((TrainBatches(d, 5, seed=3) for d in (memory, files)),):
            for (x, y), (u, v) in zip(left, right, strict=True):
                assert torch.equal(x, u) and torch.equal(y, v)
    for split in ("train", "test"):
        for (x, y), (u, v) in zip(*(EvalBatches(d, split, batch_size=4) for d in (memory, files)), strict=True):
            assert torch.equal(x, u) and torch.equal(y, v)
    assert torch.equal(EvalBatches(memory).first(13), EvalBatches(files).first(13))
    assert torch.equal(torch.get_rng_state(), before)  # the gates' noise does not depend on the source


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_shares_of_the_ranks_make_up_every_batch(folder: Path, world: int, streamed: bool) -> None:
    data = both(folder, 0)[streamed]
    whole = TrainBatches(data, 7, seed=1)
    parts = [TrainBatches(data, 7, seed=1, rank=rank, world=world) for rank in range(world)]
    for (x, y), *shares in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat([u for u, _ in shares]), x) and torch.equal(torch.cat([v for _, v in shares]), y)
        assert max(len(v) for _, v in shares) - min(len(v) for _, v in shares) <= 1
    for split in ("train", "test"):
        joined = [y for rank in range(world) for _, y in EvalBatches(data, split, batch_size=3, rank=rank, world=world)]
        assert torch.equal(torch.cat(joined), data.train_labels if split == "train" else data.test_labels)


def test_more_ranks_than_images_leave_some_without(folder: Path) -> None:
    shares = [share(3, rank, 5) for rank in range(5)]
    assert sum((list(range(3)[s]) for s in shares), []) == [0, 1, 2] and any(s.start == s.stop for s in shares)
    assert list(EvalBatches(both(folder, 0)[0], rank=1, world=40)) == []


@pytest.mark.parametrize("streamed", [False, True])
def test_batches_resume_in_the_middle_of_a_pass(folder: Path, streamed: bool) -> None:
    data = both(folder, 0)[streamed]
    straight = TrainBatches(data, 4, seed=2)
    expected = [x for _ in range(2) for x, _ in straight]
    for stop in range(1, 6):
        first = TrainBatches(data, 4, seed=2)
        found = [x for x, _ in itertools.islice(first, stop)]
        state = first.state()
        second = TrainBatches(data, 4, seed=99)
        second.set_state(state)
        found += [x for x, _ in second] + ([x for x, _ in second] if stop < len(first) else [])
        assert len(found) == len(expected) and all(map(torch.equal, found, expected)), stop


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_is_named_when_its_batch_comes(folder: Path, workers: int) -> None:
    files = both(folder, workers)[1]
    damaged = folder / "train" / "bee" / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:40])
    with pytest.raises(DataError, match=r"bee/3\.png: expected a readable image"):
        list(TrainBatches(files, 5))


def test_sigterm_to_all_processes_at_once_leaves_the_workers_alone(folder: Path, tmp_path: Path) -> None:
    """A scheduler signals the whole group; the run itself answers, after a checkpoint that needs no batch to fail."""
    script = (
        "import signal, sys, time\n"
        "from gatedconv.data import TrainBatches, load_data\n"
        "heard = []\n"
        "signal.signal(signal.SIGTERM, lambda *of: heard.append(of))\n"
        f"data = load_data('imagefolder:{folder}', image_size=8, workers=2)\n"
        "batches = TrainBatches(data, 2)\n"
        "count = 0\n"
        "for images, labels in batches:\n"
        "    count += 1\n"
        "    if count == 1:\n"
        "        print('ready', flush=True)\n"
        "        while not heard:\n"
        "            time.sleep(0.01)\n"
        "        time.sleep(0.5)\n"
        "sys.exit(0 if count == len(batches) == 11 else 1)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGTERM)
        _, told = process.communicate(timeout=60)
        assert process.returncode == 0, told


def test_a_process_that_leaves_in_the_middle_of_a_pass_ends_its_workers(folder: Path) -> None:
    """An iterator that is still alive when Python ends: the workers are told to go by SIGTERM."""
    script = (
        "from gatedconv.data import TrainBatches, load_data\n"
        f"data = load_data('imagefolder:{folder}', image_size=8, workers=2)\n"
        "batches = iter(TrainBatches(data, 2))\n"
        "next(batches)\n"
        "raise SystemExit(7)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 7


def test_a_validation_split_can_be_taken_from_files(folder: Path) -> None:
    memory, files = (validation_view(data, 0.3, seed=0) for data in both(folder, 0))
    assert torch.equal(EvalBatches(memory).first(4), EvalBatches(files).first(4))
    assert len(files.train_images) == len(files.train_labels) == len(memory.train_labels)
