"""``sertool report``: one page on one run or several, to open offline, send and print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sertool.cli.console import progress_bar


def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Evaluated runs, or folders above the folds of one; several may be joined by commas or matched by a "
            "pattern in quotes. @calibrated behind it: as sertool evaluate --calibrated found it.",
        ),
    ],
    part: Annotated[str, typer.Option(help="Part of the split: test, validation or train.")] = "test",
    embeddings: Annotated[
        list[Path],
        typer.Option(
            "--embeddings",
            help="Folder that a run's graph was made from, for the map of its clips; repeatable. One that lies beside "
            "the graph is found without.",
        ),
    ] = [],  # noqa: B006
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The page; else report.html in the run, or in this folder for several runs."
        ),
    ] = None,
) -> None:
    """Write one HTML page on evaluated runs: results, errors, calibration, learning, graph, provenance.

    The page needs no other file and no network. Several runs are compared with the first one named, where all answered
    the same clips.

    Examples:

      sertool report runs/loso

      sertool report runs/base runs/graph --embeddings embeddings -o base-and-graph.html

      sertool report runs/device runs/device@calibrated
    """
    from sertool.report import write_report

    with progress_bar() as progress:
        path = write_report(
            runs, part, output, embeddings, lambda results: progress.track(results, description="reporting")
        )
    typer.echo(path)
