"""What the documents tell people to type exists: every command with its options, every Python block, every link."""

from __future__ import annotations

import doctest
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

import edge_runtime
from edge_runtime.cli import _parser
from sertool.cli import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "edge_runtime" / "README.md"])


def commands(program: str) -> Iterator[tuple[str, list[str]]]:
    """Give each command line of a program in the documents, as (document, words after the program)."""
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(rf"^(?: {{4,}}|\$ )(?:[A-Z_]+=\S+ )*{program} ([a-z].*)$", text, re.MULTILINE):
            yield document.name, shlex.split(line.split(" | ")[0], comments=True)


@pytest.mark.parametrize(("document", "words"), list(commands("sertool")), ids=lambda value: str(value)[:60])
def test_sertool_commands_and_options_exist(document: str, words: list[str]) -> None:
    command = typer.main.get_command(app)
    rest = list(words)
    while hasattr(command, "commands"):
        assert rest[0] in command.commands, f"{document}: no command {rest[0]!r}"
        command = command.commands[rest.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts}
    for word in rest:
        assert not word.startswith("-") or word in known, f"{document}: no option {word!r}"


@pytest.mark.parametrize(("document", "words"), list(commands("ser-edge")), ids=lambda value: str(value)[:60])
def test_ser_edge_commands_and_options_exist(document: str, words: list[str]) -> None:
    assert _parser().parse_args(words).command, document


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_blocks_compile_and_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(block, str(document), "exec")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (document.parent / target).exists(), f"{document.name}: no {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_nothing_is_left_to_be_filled_in(document: Path) -> None:
    assert not re.findall(r"@[A-Z]+@|TODO|FIXME|XXX", document.read_text(encoding="utf-8"))


def test_the_documents_hold_commands_at_all() -> None:
    assert len(list(commands("sertool"))) > 10
    assert len(list(commands("ser-edge"))) > 5


@pytest.mark.parametrize("name", [name for name in edge_runtime.__all__ if not name.startswith("_")])
def test_every_public_name_of_the_device_has_an_example_that_runs(name: str) -> None:
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(getattr(edge_runtime, name)) or "")
    assert examples
    assert not any(example.options.get(doctest.SKIP) for example in examples)
