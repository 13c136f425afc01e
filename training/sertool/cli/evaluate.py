"""``sertool evaluate``: UAR, accuracy and their interval on speakers a run has not seen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from edge_runtime.errors import UsageError
from sertool.cli.console import OUTPUT, print_json, print_status, progress_bar, spectrogram_progress


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder, or the folder above the folds of one.")],
    part: Annotated[str, typer.Option(help="Part of the split: test, validation or train.")] = "test",
    in_turn: Annotated[
        bool,
        typer.Option(
            "--in-turn",
            help="Hear each speaker's clips one after the other, with statistics that run on: kept beside, as "
            "PART-in-turn.",
        ),
    ] = False,
    calibrated: Annotated[
        bool,
        typer.Option(
            "--calibrated",
            help="Hear each speaker after ser-edge calibrate on their calm speech: kept beside, as PART-calibrated.",
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Evaluate a run on unseen speakers; several folds are pooled into one result.

    A causal network is scored as it runs on a device: it hears each clip once, from its beginning. One with the paper's
    padding hears a window that the clip is repeated to.

    Writes metrics.json, predictions.csv and report.html into the run (and, for folds, into the folder above them).

    Examples:

      sertool evaluate runs/loso

      sertool evaluate runs/loso --calibrated
    """
    from sertool.evaluate import Known, part_name
    from sertool.report import evaluate_folder, report_path

    if in_turn and calibrated:
        raise UsageError("--in-turn and --calibrated: give one of them")
    known: Known = "in-turn" if in_turn else "calibrated" if calibrated else "nothing"
    with progress_bar() as progress:
        entry = evaluate_folder(
            run,
            part,
            spectrogram_progress(progress),
            lambda folds: progress.track(folds, description="evaluating"),
            known=known,
        )
    part = part_name(part, known)
    if "folds" in entry:
        _warn_of_unfinished(entry["folds"], entry["folds_of"])
    if json:
        print_json(entry)
    else:
        _print(entry, f"{run}, {part} speakers")
        typer.echo(f"more in {report_path(run, part)}")


def _warn_of_unfinished(folds: list[int], count: int) -> None:
    missing = [str(number) for number in range(1, count + 1) if number not in folds]
    if missing:
        print_status(f"this result lacks fold {', '.join(missing)}: not trained to the end yet")


def describe_folds(folds: list[int], count: int | None) -> str:
    """Say how many folds of how many were pooled, and which are lacking; ``count`` is None where it is unknown."""
    if count is None:
        return f"folds: {len(folds)}"
    missing = ", ".join(str(number) for number in range(1, count + 1) if number not in folds)
    return f"folds: {len(folds)} of {count}" + (f", incomplete: lacks {missing}" if missing else "")


def _print(entry: dict[str, Any], title: str) -> None:
    labels = entry["labels"]
    # As Text, because labels and paths may hold square brackets, which in a string are rich's own markup.
    table = Table(title=Text(f"{title}: confusion (rows: truth)", style="table.title"))
    for column in ("", *labels, "recall"):
        table.add_column(Text(column), justify="left" if not column else "right")
    for label, row in zip(labels, entry["confusion"], strict=True):
        recall = entry["recall"][label]
        table.add_row(Text(label), *map(str, row), "-" if recall is None else f"{recall:.1%}")
    OUTPUT.print(table)
    interval = entry["uar_interval"]
    between = f"95 % interval {interval[0]:.1%} to {interval[1]:.1%} over speakers" if interval else ""
    typer.echo(f"UAR {entry['uar']:.1%}, {between or 'no interval: one speaker'}")
    heard = "each heard once, as a stream from its beginning" if entry["form"] == "stream" else "each as one window"
    typer.echo(f"accuracy {entry['accuracy']:.1%} of {entry['items']} clips, {heard}")
    if "folds" in entry:
        typer.echo(describe_folds(entry["folds"], entry["folds_of"]))
    for kind in ("speakers", "genders"):
        shares = "  ".join(f"{name} {uar:.1%}" for name, uar in entry[kind].items())
        typer.echo(f"UAR by {kind[:-1]}: {shares or 'unknown'}")
