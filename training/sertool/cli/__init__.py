"""The command ``sertool``: a module per group of subcommands; each imports heavy libraries only when it runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer

from edge_runtime.errors import SerError, UsageError
from sertool import __version__
from sertool.cli import (
    compare,
    corpus,
    embed,
    evaluate,
    export,
    graph,
    networks,
    paper,
    parity,
    pretrain,
    recipe,
    report,
    robustness,
    split,
    teacher,
    train,
)

SEVERAL = int(os.environ.get("WORLD_SIZE") or 1) > 1
"""Whether torchrun has started more processes of this command than this one."""

TOGETHER = ("train", "embed", "teacher")
"""Commands that several processes run as one."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Train speech emotion recognisers small enough for ARM boards.",
)
app.add_typer(corpus.app, name="corpus")
app.add_typer(split.app, name="split")
app.add_typer(teacher.app, name="teacher")
app.command("embed")(embed.embed)
app.command("graph")(graph.graph)
app.add_typer(recipe.app, name="recipe")
app.command("networks")(networks.networks)
app.command("pretrain")(pretrain.pretrain)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("robustness")(robustness.robustness)
app.command("report")(report.report)
app.command("compare")(compare.compare)
app.command("paper")(paper.paper)
app.command("export")(export.export)
app.command("parity")(parity.parity)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sertool {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Show the version."),
) -> None:
    """Options that stand before the subcommand."""


def main() -> None:
    """Run ``sertool``; a failure is one line on stderr: exit code 2 for usage, 1 for a failure, 130 for Ctrl-C."""
    # typer's own error boxes span several lines; outside its standalone mode they arrive here as exceptions.
    try:
        if SEVERAL:
            _join_processes()
        code = app(standalone_mode=False)
    except SerError as error:
        code = _fail(str(error), error.exit_code)
    except typer.TyperException as error:
        code = _fail_usage(error)
    except OSError as error:
        code = _fail(f"{error.filename or 'file'}: {error.strerror or error}", 1)
    if code == 130:  # typer turns Ctrl-C into this code and says nothing
        # These keep what they have done so far.
        kept = sys.argv[1:2] in (["train"], ["embed"], ["teacher"], ["paper"], ["robustness"])
        advice = "; the same command goes on from here" if kept else ""
        _fail(f"interrupted{advice}", code)
    if SEVERAL:
        _leave_processes()
    sys.exit(code)


def _join_processes() -> None:
    """Become one of the processes that torchrun has started; only number 0 prints."""
    command = next(iter(sys.argv[1:]), "")
    if command not in TOGETHER:
        raise UsageError(f"sertool {command}: runs in one process, without torchrun; in several: {', '.join(TOGETHER)}")
    from sertool import processes
    from sertool.cli.console import STATUS

    processes.start()
    if processes.rank():
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
        STATUS.quiet = True


def _leave_processes() -> None:
    from sertool import processes

    processes.end()


def _first_to_fail() -> bool:
    """Tell whether no other process has failed before, so that one failure is one line."""
    if not SEVERAL:
        return True
    from sertool.processes import first_to_fail

    return first_to_fail()


def _fail(message: str, code: int) -> int:
    if _first_to_fail():
        typer.echo(f"sertool: {message}", err=True)
    return code


def _fail_usage(error: typer.TyperException) -> int:
    message = error.format_message()
    if not message:  # a command group without a command has printed its help
        return 2
    context = getattr(error, "ctx", None)
    return _fail(f"{message} See: {context.command_path if context else 'sertool'} --help", 2)
