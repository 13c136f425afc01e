"""The entry of the command line: Ctrl-C at any moment, folders for files, and text that looks like markup."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STOPPED_AT_AN_IMPORT = """
import sys
class Stop:
    def find_spec(self, name, *_):
        if name == {module!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Stop())
from sertool.__main__ import main
main()
"""


@pytest.mark.parametrize("module", ["typer", "pydantic", "rich.console"])
def test_ctrl_c_while_the_program_starts_is_one_line(module: str) -> None:
    command = [sys.executable, "-c", STOPPED_AT_AN_IMPORT.format(module=module), "networks"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "sertool: interrupted\n")


def test_the_package_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "sertool", "split", "show", "nowhere.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "sertool: nowhere.json: no such split; make one with: sertool split make\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("split", "show", "s.json"), "sertool: interrupted\n"),
        (("embed", "m.csv", "--teacher", "t"), "sertool: interrupted; the same command goes on from here\n"),
    ],
)
def test_only_what_goes_on_promises_it(
    sertool: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sertool.corpora.splits.load_split", stop)
    monkeypatch.setattr("sertool.corpora.manifest.load_manifest", stop)
    assert sertool(*arguments) == (130, "", message)


@pytest.mark.parametrize("options", [(), ("--force",)])
def test_a_folder_for_a_file_is_one_line(
    sertool: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = sertool("recipe", "new", ".", *options)
    assert outcome == (2, "", "sertool: .: is a folder; give the name of a file\n")


def test_square_brackets_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    from sertool.cli.console import OUTPUT, print_status

    text = "runs/[bold]x[/] :smile: [/red]"
    table = Table("name")
    table.add_row(text)
    OUTPUT.print(table)
    print_status(text)
    out, err = capsys.readouterr()
    assert f" {text} " in out and err == f"{text}\n"
