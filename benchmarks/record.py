"""Result files: ``results/DEVICE-TORCH-COMMIT.json``, one per machine, torch and commit, grown by cases."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from gatedconv._io import write_atomic
from gatedconv.environment import commit, versions
from gatedconv.report.bench import Row
from gatedconv.report.peers import peer_versions

RESULTS = Path(__file__).resolve().parent / "results"
HEADER = ("device", "cpu", "isa", "threads", "torch", "triton", "cuda", "versions", "commit", "date")
_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "GATEDCONV_ISA")


class Record:
    """The rows of one machine, torch and commit.

    Args:
        path: the file; read if it is there, so that an interrupted run goes on where it stopped.

    Attributes:
        header: what the rows have in common.
        rows: result rows, JSON types.
        failures: what could not be timed, with its reason.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path, self.header = path, header
        self.rows: list[dict[str, Any]] = []
        self.failures: list[dict[str, Any]] = []
        if path.exists():
            found = read(path)
            different = [key for key in HEADER if key != "date" and found[key] != header[key]]
            if different:
                raise ValueError(f"{path}: holds results of another set-up ({', '.join(different)} differ)")
            self.rows, self.failures = found["rows"], found["failures"]

    def has(self, benchmark: str, case: str, batch: int) -> bool:
        """Whether a case is measured already."""
        return any(
            (row["benchmark"], row["case"], row["batch"]) == (benchmark, case, batch) for row in self.rows
        )

    def add(self, rows: Iterable[Row], failures: Iterable[dict[str, Any]]) -> None:
        """Append a case and write the file, as a whole or not at all."""
        self.rows += [row.as_dict() for row in rows]
        self.failures += failures
        body = {**self.header, "rows": self.rows, "failures": self.failures}
        write_atomic(self.path, _as_text(body).encode())


def read(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        ValueError: a key is missing, in the file or in one of its rows.
    """
    found: dict[str, Any] = json.loads(path.read_text())
    missing = [key for key in (*HEADER, "rows", "failures") if key not in found]
    fields = [field.name for field in dataclasses.fields(Row)]
    missing += [field for row in found.get("rows", []) for field in fields if field not in row]
    if missing:
        raise ValueError(f"{path}: keys are missing: {', '.join(sorted(set(missing)))}")
    return found


def result_files(folder: Path = RESULTS) -> list[Path]:
    """The files of a folder that hold rows of a device; others, of other measurements, lie beside them."""
    return [path for path in sorted(folder.glob("*.json")) if "device" in json.loads(path.read_text())]


def machine_header(threads: int) -> dict[str, Any]:
    """What describes this machine, its software and the checkout."""
    model = _cpu_model()
    return {
        "device": device_name(
            model, os.cpu_count() or 1, limited=any(os.environ.get(name) for name in _LIMITS)
        ),
        "cpu": model,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "torch": torch.__version__,
        "triton": None,
        "cuda": None,
        "versions": {**versions(), **peer_versions()},
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
    }


def default_path(header: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Where the rows of this machine, torch and commit go."""
    commit_name = (header["commit"] or "unknown").replace("+changes", "")[:10]
    return folder / f"{header['device']}-{header['torch'].replace('+', '-')}-{commit_name}.json"


def device_name(model: str, cores: int, limited: bool = False) -> str:
    """A short name such as "epyc-2c"; one where PyTorch was held back from AVX-512 ends in "-avx2"."""
    family = re.search(r"epyc|xeon|ryzen|threadripper|core|apple|graviton|neoverse", model.lower())
    return f"{family.group() if family else 'cpu'}-{cores}c{'-avx2' if limited else ''}"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    named = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    family = "/".join(named.get(key, "?") for key in ("cpu family", "model"))
    return f"{named.get('model name', 'unknown')} (family/model {family})"


def _as_text(body: dict[str, Any]) -> str:
    """JSON with one row a line, so that two files can be compared line by line."""
    lists = {key: body[key] for key in ("rows", "failures")}
    head = json.dumps({key: value for key, value in body.items() if key not in lists}, indent=1)[:-2]
    parts = [head]
    for key, rows in lists.items():
        lines = ",\n".join("  " + json.dumps(row) for row in rows)
        parts.append(f' "{key}": [\n{lines}\n ]' if rows else f' "{key}": []')
    return ",\n".join(parts) + "\n}\n"
