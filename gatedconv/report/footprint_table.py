"""The file and the table of footprints: sizes, memory and times of a run's network in each runtime."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gatedconv._io import require_schema

FILE_NAME = "footprint.json"
_MAYBE = (int, float, type(None))
_ROW = {"runtime": str, "version": str, **dict.fromkeys(("file", "package", "peak_mib"), _MAYBE)}
_ROW |= dict.fromkeys(("import_ms", "first_ms", "call_ms"), _MAYBE)


def footprint_rows(footprints: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of a table of footprints, as read from JSON."""
    header = [
        "runtime",
        "version",
        "file (MB)",
        "package (MB)",
        "memory (MiB)",
        "import (ms)",
        "first (ms)",
        "call (ms)",
    ]
    columns = (("file", 1e-6, 2), ("package", 1e-6, 1), ("peak_mib", 1, 0), ("import_ms", 1, 1), ("first_ms", 1, 1))

    def cells(row: Mapping[str, Any]) -> list[str]:
        shown = [*columns, ("call_ms", 1, 3)]
        return [str(row["runtime"]), str(row["version"])] + [
            "-" if row[key] is None else f"{scale * row[key]:.{digits}f}" for key, scale, digits in shown
        ]

    return header, [cells(row) for row in footprints]


def read_footprints(path: Path) -> list[dict[str, Any]]:
    """Read the rows that `gatedconv bench RUN --footprint` keeps.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, found damaged text ({error})") from None
    require_schema(rows, list, str(path))
    for row in rows:
        require_schema(row, _ROW, str(path))
    return rows
