"""The documents: their code runs, their numbers are those of the committed results."""

from __future__ import annotations

import ast
import importlib
import inspect
import operator
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import gatedconv
from gatedconv.cli import COMMANDS, Parser
from tests.tolerances import assert_close

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.filterwarnings("ignore:freeze")
def test_the_readme_examples_run_one_after_the_other(capsys):
    pytest.importorskip("torchvision")
    sketch, *blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(sketch.splitlines()) == 5 and len(blocks) == 2
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    small, engine, images = namespace["small"], namespace["engine"], namespace["images"]
    out = capsys.readouterr().out
    assert "layer1.0" in out
    assert_close(engine(images[:8]), small.eval()(images[:8]))


def python_blocks():
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        found = re.findall(r"^ *```python\n(.*?)^ *```", page.read_text(), re.S | re.M)
        for number, block in enumerate(found, start=1):
            yield pytest.param(textwrap.dedent(block), id=f"{page.stem} {number}")


@pytest.mark.parametrize("block", [*python_blocks()])
def test_the_code_of_the_documents_uses_what_there_is(block):
    """It parses; the names of gatedconv exist, and what is called takes the arguments that it is given."""
    if "HubModel" in block:
        pytest.importorskip("huggingface_hub")
    nodes = [*ast.walk(ast.parse(block))]
    dotted = {node: ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    names = {node: name[10:] for node, name in dotted.items() if re.fullmatch(r"gatedconv(\.\w+)+", name)}
    ours = {node: operator.attrgetter(name)(gatedconv) for node, name in names.items()}
    for node in nodes:
        if isinstance(node, ast.Call) and node.func in ours:
            keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            inspect.signature(ours[node.func]).bind_partial(*[None] * len(node.args), **keywords)


def test_the_numbers_of_the_documents_come_from_the_results():
    done = subprocess.run([sys.executable, str(ROOT / "docs" / "write.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def commands():
    """The lines of README, docs and example docstrings that call `gatedconv COMMAND ARGUMENTS`."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.py")]
    for page in (*pages, *ROOT.glob("*/README.md")):
        for line in re.findall(r"^ *gatedconv [a-z].*", page.read_text().replace("\\\n", " "), re.M):
            words = shlex.split(line.replace("...", ""), comments=True)[1:]
            if words[0] in COMMANDS:
                yield pytest.param(words, id=f"{page.stem}: {' '.join(words)}")


@pytest.mark.parametrize("words", [*commands()])
def test_the_command_line_takes_what_the_documents_call(words):
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
    parser = Parser(prog=name)
    importlib.import_module(f"gatedconv.cli.{name.replace(' ', '_')}").add_arguments(parser)
    parser.parse_args(words[len(name.split()) :])


def test_links_between_the_documents_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_is_in_the_navigation_of_the_site():
    navigation = (ROOT / "mkdocs.yml").read_text().split("nav:")[1]
    for page in (ROOT / "docs").rglob("*.md"):
        assert f": {page.relative_to(ROOT / 'docs').as_posix()}\n" in navigation, page


def test_the_table_of_environment_variables_is_complete():
    sources = [*(ROOT / "gatedconv").rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp")]
    reading = r'(?:environ\.get\(|getenv\(|_VARIABLE = )"(GATEDCONV_\w+)"'
    read = {name for path in sources for name in re.findall(reading, path.read_text())}
    page = (ROOT / "docs" / "howto" / "describe.md").read_text()
    assert read == set(re.findall(r"^\| `(GATEDCONV_[A-Z_]+)", page, re.M))
