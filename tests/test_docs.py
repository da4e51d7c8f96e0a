"""What README and docs show is what happens: their code runs, their links lead somewhere.

A block that cannot run here stands behind ``<!-- skip: next "why" -->``. Sybil runs the others, a document after the
other, each with names of its own; <!--- invisible-code-block: python --> makes what a reader has.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from unittest import SkipTest

import pytest
from subprocesses import ROOT
from sybil import Document, Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

from barlow_fused.__main__ import main

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "examples/README.md")]
FENCE = re.compile(r"^ *```(\w*)", re.MULTILINE)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
LONGEST_LINE = 128
EVERY = list(dict.fromkeys([*DOCUMENTS, *OTHERS]))
BY_NAME = {"ids": lambda path: str(path.relative_to(ROOT))}


def run_console(example: Example) -> None:
    """``$ barlow-fused ...`` and what it prints, if the block says so."""
    assert example.parsed.startswith("$ "), "a console block begins with a command"
    for block in example.parsed.removeprefix("$ ").split("\n$ "):
        command, _, expected = block.partition("\n")
        program, *arguments = shlex.split(command, comments=True)
        assert program == "barlow-fused", f"{command} is not a command that a test can run: say why it is skipped"
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert main(arguments) == 0
        if expected.strip():
            assert printed.getvalue().rstrip() == expected.rstrip()


def read(path: Path) -> Document:
    console = CodeBlockParser(language="console", evaluator=run_console)
    return Sybil(parsers=[PythonCodeBlockParser(), console, SkipParser()]).parse(path)


def run_all(document: Document) -> list[str]:
    """Runs the blocks of a document; why those that were skipped were."""
    reasons = []
    for example in document.examples():
        try:
            example.evaluate()
        except SkipTest as skipped:
            reasons.append(str(skipped))
    return reasons


@pytest.fixture
def as_before(tmp_path, monkeypatch) -> Iterator[None]:
    """Documents patch libraries and set choices."""
    from barlow_fused import choice
    from barlow_fused.integrations import LIBRARIES, unpatch

    monkeypatch.chdir(tmp_path)
    yield
    for library in LIBRARIES:
        unpatch(library)
    choice._layers.clear()


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("path", DOCUMENTS, **BY_NAME)
def test_the_code_of_a_document_runs(path):
    for module in {"lightly", "monai"} & set(re.findall(r"(?:from |patch\(.)(\w+)", path.read_text())):
        pytest.importorskip(module)
    assert all(len(reason) > 5 for reason in run_all(read(path)))


@pytest.mark.parametrize(
    ("block", "error"),
    [
        ("```python\nassert 1 == 2\n```\n", AssertionError),
        ("```console\n$ barlow-fused plan --n 64 --d 256 --device h200\nsomething else\n```\n", AssertionError),
        ("```console\n$ make test\n```\n", AssertionError),
        ("```python\nbarlow_twins_loss\n```\n", NameError),
    ],
)
def test_code_that_does_not_run_is_noticed(block, error, tmp_path):
    path = tmp_path / "page.md"
    path.write_text(block)
    with pytest.raises(error):
        run_all(read(path))
    path.write_text(f'<!-- skip: next "needs a GPU" -->\n{block}')
    assert run_all(read(path)) == ["needs a GPU"]


@pytest.mark.parametrize("path", DOCUMENTS, **BY_NAME)
def test_a_block_says_what_it_is(path):
    languages = FENCE.findall(path.read_text())
    assert set(languages[::2]) <= {"python", "console", "text"}
    assert set(languages[1::2]) <= {""}


@pytest.mark.parametrize("path", EVERY, **BY_NAME)
def test_lines_are_short(path):
    long = re.sub(r"<!-- benchmarks: .*?<!-- /benchmarks -->", "", path.read_text(), flags=re.DOTALL).splitlines()
    assert not [line for line in long if len(line) > LONGEST_LINE and not line.startswith("|")]


def anchors(path: Path) -> set[str]:
    """The headings of a document, as links name them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", OTHERS, **BY_NAME)
def test_links_outside_of_the_site_lead_somewhere(path):
    """Those of the site are checked where it is built."""
    for link in LINK.findall(path.read_text()):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        found = (path.parent / target).resolve() if target else path
        assert found.exists(), link
        assert not anchor or anchor in anchors(found), link


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
