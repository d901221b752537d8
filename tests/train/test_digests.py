"""Training gives the same bits as when `digests.json` was written, for the version of PyTorch that it names.

``python -m tests.train.test_digests [PYTHON]`` writes the digests of the installed PyTorch (or of that interpreter's).
A digest may change with a commit that means to change results; its message contains that.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

RECORDED = Path(__file__).with_name("digests.json")
_BASE = ["--data", "npz:digits.npz", "--epochs", "2", "--batch-size", "32", "--warmup-epochs", "0.5"]
_BASE += ["--threads", "1", "--no-latency", "--device", "cpu", "--checkpoint-minutes", "0", "--amp", "off"]
_DEFAULT = ["--preset", "best-c10-r20", *_BASE, "--epochs", "3"]
_MACS = ["--mac-weight", "4", "--mac-target", "0.5"]
# A list of command lines for each run; the last exit code is 0, of those before 3.
RUNS: dict[str, list[list[str]]] = {
    "layer": [[*_BASE, *_MACS, "--gate", "layer", "--dense-baseline"]],
    "channel": [[*_BASE, "--gate", "channel", "--position", "middle", "--mac-control", "price"]],
    "both": [[*_BASE, *_MACS, "--gate", "both", "--estimator", "gumbel", "--label-smoothing", "0.1"]],
    "default": [_DEFAULT],
    "accumulate": [[*_BASE, *_MACS, "--gate", "layer", "--accumulate", "2", "--grad-clip", "1"]],
    "recompute": [[*_BASE, *_MACS, "--gate", "channel", "--recompute", "--hidden", "0", "--pool", "flatten"]],
    "resumed": [[*_DEFAULT, "--max-minutes", "1e-6"], ["--resume", "resumed", "--max-minutes", "0"]],
}
# Numbers of the CPU at hand, of time and of the machine; what the summary has of the data.
_VARYING = {
    "seconds",
    "core_seconds",
    "wall_s",
    "versions",
    "commit",
    "device",
    "threads",
    "energy_j",
    "energy_reason",
    "energy_source",
    "energy_j_image",
    "blocks",
    "exports",
    "images",
}
# Bits that depend on no CPU: one thread, PyTorch's plain loops, MKL's common path, no oneDNN, no kernels of ours.
_SETTINGS = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "GATEDCONV_ISA": "portable",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
_PROGRAM = """
import json, sys
import torch
def left_out(*arguments, **options):
    raise ImportError("exports take time, and are not of training")
torch.export.export = left_out
sys.modules["onnx"] = sys.modules["matplotlib"] = None
torch.backends.mkldnn.enabled = False
from gatedconv.cli import main
for name, lines in json.loads(sys.argv[1]).items():
    for number, line in enumerate(lines, start=1):
        place = [] if "--resume" in line else ["--folder", name]
        code = main(["train", *line, *place])
        assert code == (0 if number == len(lines) else 3), (name, line, code)
"""


def train_all(folder: Path, python: str = sys.executable) -> dict[str, dict[str, str]]:
    """Make all runs in a folder; their digests by name."""
    _write_digits(folder / "digits.npz")
    done = subprocess.run(
        [python, "-c", _PROGRAM, json.dumps(RUNS)],
        cwd=folder,
        env=os.environ | _SETTINGS,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: digests(folder / name) for name in RUNS}


def digests(run: Path) -> dict[str, str]:
    """Of the networks that a run wrote, of its metrics and of its summary, times aside."""
    from safetensors.torch import load_file

    found = {}
    for kind in ("dense", "gated", "compact"):
        path = run / f"{kind}.safetensors"
        if path.is_file():
            state = sorted(load_file(path).items())
            parts = [
                f"{name} {t.dtype} {tuple(t.shape)}".encode() + t.contiguous().numpy().tobytes() for name, t in state
            ]
            found[kind] = _hash(b"".join(parts))
    lines = [_kept(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = _hash(json.dumps(lines, sort_keys=True).encode())
    found["summary"] = _hash(json.dumps(_kept(json.loads((run / "summary.json").read_text())), sort_keys=True).encode())
    return found


def _kept(record: Any) -> Any:
    if not isinstance(record, dict):
        return record
    return {key: _kept(value) for key, value in record.items() if key not in _VARYING}


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]


def _write_digits(path: Path) -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, labels = (bunch.images * 15).astype(np.uint8), bunch.target.astype(np.int64)
    arrays = {"train_images": images[:192], "train_labels": labels[:192]}
    np.savez(path, **arrays, test_images=images[192:256], test_labels=labels[192:256])


def _version() -> str:
    return torch.__version__.partition("+")[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    recorded = json.loads(RECORDED.read_text())
    if _version() not in recorded:
        pytest.skip(f"digests are of PyTorch {', '.join(recorded)}; this is {_version()}")
    return train_all(tmp_path_factory.mktemp("digests"))


@pytest.mark.parametrize("name", RUNS)
def test_the_same_bits_as_recorded(trained: dict[str, dict[str, str]], name: str) -> None:
    assert trained[name] == json.loads(RECORDED.read_text())[_version()][name]


def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_interrupted(trained: dict[str, dict[str, str]]) -> None:
    networks = ("gated", "compact", "metrics")
    assert [trained["resumed"][kind] for kind in networks] == [trained["default"][kind] for kind in networks]


if __name__ == "__main__":
    chosen = sys.argv[1] if len(sys.argv) > 1 else sys.executable
    version = subprocess.run(
        [chosen, "-c", "import torch; print(torch.__version__.partition('+')[0])"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    with tempfile.TemporaryDirectory() as place:
        made = train_all(Path(place), chosen)
    known = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    RECORDED.write_text(json.dumps(known | {version: made}, indent=1) + "\n")
