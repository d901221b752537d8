"""What the documents say: their code runs, their numbers are those of the committed results."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.filterwarnings("ignore:freeze")
def test_the_readme_examples_run_one_after_the_other(capsys):
    pytest.importorskip("torchvision")
    sketch, *blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(sketch.splitlines()) == 4 and len(blocks) == 2
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    small, engine, images = namespace["small"], namespace["engine"], namespace["images"]
    out = capsys.readouterr().out
    assert "layer1.0" in out
    error = (engine(images[:8]) - small.eval()(images[:8])).abs().max()
    assert error <= 1e-5 * small(images[:8]).abs().max()


def test_the_numbers_of_the_documents_come_from_the_results():
    done = subprocess.run([sys.executable, str(ROOT / "docs" / "write.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_links_between_the_documents_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_is_in_the_navigation_of_the_site():
    navigation = (ROOT / "mkdocs.yml").read_text().split("nav:")[1]
    for page in (ROOT / "docs").rglob("*.md"):
        assert f": {page.relative_to(ROOT / 'docs').as_posix()}\n" in navigation, page
