"""The measured sections of docs/performance.md: where each one stands, and how it is replaced."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "performance.md"


def marks(name: str, module: str) -> tuple[str, str]:
    """The comments around the section that ``python -m module`` writes."""
    return f"<!-- {name}: begin, written by python -m {module} -->", f"<!-- {name}: end -->"


def render(document: str, marks: tuple[str, str], section: str) -> str:
    """The document with what stands between the marks replaced.

    Raises:
        ValueError: the document does not have both marks, in order.
    """
    before, begin, rest = document.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise ValueError(f"expected the marks {marks[0]} and {marks[1]}")
    return f"{before}{begin}\n\n{section}\n\n{end}{after}"


def update(marks: tuple[str, str], section: str, *, check: bool) -> int:
    """Write the section; with ``check`` write nothing and return 1 if the document is out of date."""
    before = DOCUMENT.read_text()
    after = render(before, marks, section)
    if not check:
        DOCUMENT.write_text(after)
    return int(check and before != after)


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A table whose first ``texts`` columns are text, the others numbers."""
    rule = ["---"] * texts + ["---:"] * (len(header) - texts)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))
