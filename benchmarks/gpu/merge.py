"""Takes what calls of training brought back into ``results/``: ``python -m benchmarks.gpu.merge PLACE ...``.

A place is a folder of archives, one above several such, or an archive. Rows go into ``ledger.jsonl``, epochs into
``epochs/``, what the gates agreed on into ``consensus/``. What is there already is skipped; if anything of a run is
there and differs, nothing is written, and the exit code is 2. ``--results FOLDER`` is for another folder than
``results``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.gpu.__main__ import fail, prepare
from benchmarks.gpu.session import ROOT


def main(arguments: list[str]) -> int:
    """Merge what is named; 0, or 2 with one line where that cannot be."""
    results = ROOT / "results"
    if "--results" in arguments[:-1]:
        at = arguments.index("--results")
        results, arguments = Path(arguments[at + 1]), arguments[:at] + arguments[at + 2 :]
    if not arguments or any(argument.startswith("-") for argument in arguments):
        return fail("merge: expected folders of archives, or archives, and --results FOLDER at most")
    try:
        prepare()
        from benchmarks.gpu.rows import merge

        lines = merge([Path(argument) for argument in arguments], results)
    except (ValueError, OSError, ImportError) as error:
        return fail(f"merge: {error}")
    print("\n".join(lines) if lines else "nothing new")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
