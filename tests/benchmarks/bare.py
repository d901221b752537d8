"""A copy of the source without history, in a Python where gatedconv is not installed, with a table of tiny runs."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.image_files import write_npz

ROOT = Path(__file__).resolve().parents[2]
# Appended to the table of the copy: ResNet-20 on a few images of 8x8, gates shut by rank, a consensus after half of it.
# Steps enough in the first half that gates are shut.
TABLE = '''
_TINY = {
    "data": "npz:blobs.npz", "model": "resnet20", "gate": "channel", "position": "middle", "epochs": 2,
    "batch_size": 2, "lr": 0.05, "latency": False, "threads": 1, "mac_control": "rank", "consensus_at": 0.5,
    "mac_ramp": (0.0, 0.35), "mac_target": 0.5,
}
_whole_table = all_experiments


def all_experiments():
    gated = Experiment("tiny", "gated", "", _TINY, (0, 1), ("cpu",))
    dense = {**_TINY, "gate": "none", "consensus_at": 1.0, "mac_control": "none"}
    rows = (gated, controls(gated)[1], replace(gated, name="tiny-dense", kind="dense", settings=dense))
    naive = replace(gated, name="tiny-naive", kind="naive_layer", needs="tiny-dense", share=20)
    broken = replace(gated, name="tiny-broken", settings={**_TINY, "pad": 9})
    return {each.name: each for each in (*rows, naive, broken)} | _whole_table()
'''


class Bare:
    """The copy, and how its commands are called."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "copy"
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "gatedconv", "kernels",
             "benchmarks/*.py", "benchmarks/gpu", "pyproject.toml"],
            cwd=ROOT, capture_output=True, check=True,
        )  # fmt: skip
        for name in filter(None, listed.stdout.decode().split("\0")):
            if (ROOT / name).is_file():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                (self.root / name).write_bytes((ROOT / name).read_bytes())
        table = self.root / "gatedconv" / "report" / "experiments.py"
        table.write_text(table.read_text() + TABLE)
        (self.root / "results").mkdir()
        write_npz(self.root / "blobs.npz")

    def call(self, module: str, *arguments: str, packages: object = None, **environment: object) -> tuple[int, str]:
        """Exit code and output of ``python -m benchmarks.gpu.MODULE``; the folder ``packages`` comes before others."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        folders = [str(packages)] * (packages is not None) + [sysconfig.get_paths()["purelib"]]
        told = {
            "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1", "DEVICE": "cpu", "STORE": "no-store",
            "SOURCES": "blobs=npz:blobs.npz", "GATEDCONV_COMMIT": "0123abc", "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        # The interpreter of the virtual environment would find the installed package by itself.
        command = [sys._base_executable, "-m", f"benchmarks.gpu.{module}", *arguments]  # type: ignore[attr-defined]
        done = subprocess.run(
            command, cwd=self.root, env={**kept, **told, **{name: str(value) for name, value in environment.items()}},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280,
        )  # fmt: skip
        return done.returncode, done.stdout
