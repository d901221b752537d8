"""The examples run from the command line and end with their tables."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import gatedconv
from tests.tolerances import tolerance

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def output(name: str, *arguments: str, **options: object) -> list[str]:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **options,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_train_loop_ends_with_its_table():
    *_, header, dense, compact, finished, engine, agreement = output("train_loop.py", "--quick")
    assert header.split() == ["network", "top-1", "MACs", "(M)", "k", "params"]
    numbers = {
        row[:24].strip(): [float(number) for number in row[24:].split()] for row in (dense, compact, finished, engine)
    }
    assert list(numbers) == ["dense", "compact", "compact, trained further", "the same by Engine"]
    _, dense_macs, dense_params = numbers["dense"]
    assert 0.4 * dense_macs < numbers["compact"][1] <= 0.51 * dense_macs and numbers["compact"][2] < dense_params
    assert numbers["compact, trained further"] == numbers["the same by Engine"]  # exactness
    assert re.fullmatch(r"agreement of the gates: [\d.]+%", agreement)


def test_train_loop_by_the_paper_freezes_at_the_end():
    *_, dense, compact, engine, agreement = output("train_loop.py", "--quick", "--paper")
    assert [row[:24].strip() for row in (dense, compact, engine)] == ["dense", "compact", "the same by Engine"]
    assert compact[24:] == engine[24:] and float(compact.split()[2]) <= float(dense.split()[2])
    assert agreement.startswith("agreement of the gates: ")


def test_swap_conv2d_prunes_and_loses_nothing_by_compacting():
    pattern = r"(\w+) +top-1 +([\d.]+) %, +(\d+) k MACs"
    agreement, *lines = output("swap_conv2d.py", "--quick")
    rows = [re.fullmatch(pattern, line) for line in lines]
    assert agreement.startswith("agreement of the images: ") and all(rows)
    assert [row[1] for row in rows] == ["gated", "frozen", "compact"]
    assert rows[1][2] == rows[2][2] and int(rows[2][3]) < int(rows[1][3]) < int(rows[0][3])
    assert int(rows[2][3]) <= 0.5 * int(rows[0][3])


@pytest.mark.slow
def test_finetune_prunes_a_network_on_a_folder(tmp_path):
    pytest.importorskip("torchvision")
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("dark", "light"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(8):
                pixels = rng.integers(0, 128, (32, 32, 3)) + (128 if name == "light" else 0)
                image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    lines = output(
        "finetune.py",
        str(tmp_path / "images"),
        "--epochs",
        "3",
        "--batch-size",
        "4",
        "--image-size",
        "32",
        "--gate",
        "channel",
        "--out",
        "small.safetensors",
        "--result",
        "result.json",
        cwd=tmp_path,
    )
    found = re.fullmatch(r"top-1 [\d.]+ %, ([\d.]+) of ([\d.]+) M MACs", lines[-1])
    assert found and float(found[1]) < 0.8 * float(found[2])
    assert (tmp_path / "small.safetensors").stat().st_size > 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert f"{result['macs'] / 1e6:.1f}" == found[1] and result["arguments"]["epochs"] == 3


@pytest.mark.slow
def test_quantize_measures_what_int8_loses(tmp_path):
    pytest.importorskip("nncf")
    pytest.importorskip("openvino")
    rng = np.random.default_rng(0)
    archive = {}
    for split, count in (("train", 40), ("test", 30)):
        archive[f"{split}_images"] = rng.integers(0, 256, (count, 8, 8, 3), np.uint8)
        archive[f"{split}_labels"] = rng.integers(0, 10, (count, 1))
    np.savez(tmp_path / "images.npz", **archive)
    torch.manual_seed(0)
    gatedconv.save(gatedconv.models.resnet20(10, input_size=(3, 8, 8)).eval(), tmp_path / "net.safetensors")
    arguments = ["net.safetensors", "images.npz", "--images", "50", "--rounds", "1", "--result", "result.json"]
    *_, engine, exact, int8 = output("quantize.py", *arguments, "--threads", "1", cwd=tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["runtime"] for row in result["rows"]] == [line[:28].strip() for line in (engine, exact, int8)]
    errors = [row["error"] for row in result["rows"]]
    assert max(errors[:2]) <= tolerance() < errors[2] < 1 and result["rows"][0]["same_top1"] == 100
    assert (tmp_path / "int8.xml").is_file() and result["int8_bytes"] > 0
    assert result["calibration_images"] == 40  # all that there are
    assert {"nncf", "openvino", "torch"} <= set(result["versions"]) and "commit" in result


@pytest.mark.parametrize("network", ["yolov8n.yaml", "yolo11n.yaml"])
def test_yolo_is_pruned_in_its_own_trainer(network, tmp_path, monkeypatch):
    pytest.importorskip("ultralytics")
    pytest.importorskip("polars")  # their trainer's tables
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))  # its settings
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / kind / split).mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
            pixels[16:40, 20:50] = 255
            image.fromarray(pixels).save(tmp_path / "images" / split / f"{number}.png")
            (tmp_path / "labels" / split / f"{number}.txt").write_text(f"{number % 2} 0.547 0.4375 0.469 0.375\n")
    data = {"path": str(tmp_path), "train": "images/train", "val": "images/val", "names": {"0": "a", "1": "b"}}
    (tmp_path / "data.yaml").write_text(json.dumps(data))
    sizes = ["--batch-size", "2", "--image-size", "64", "--workers", "0"]
    lines = output(
        "yolo_trainer.py",
        "data.yaml",
        "--model",
        network,
        "--epochs",
        "2",
        *sizes,
        "--out",
        "small.safetensors",
        cwd=tmp_path,
    )
    found = re.fullmatch(r"mAP50-95 [\d.]+, ([\d.]+) of ([\d.]+) M MACs", lines[-1])
    assert found and float(found[1]) <= float(found[2])
    assert (tmp_path / "small.safetensors").stat().st_size > 0


def test_yolo_refuses_several_devices(tmp_path, monkeypatch):
    pytest.importorskip("ultralytics")
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    command = [sys.executable, str(EXAMPLES / "yolo_trainer.py"), "data.yaml", "--device", "0,1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "--device: expected one device" in done.stderr
