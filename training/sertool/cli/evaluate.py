"""``sertool evaluate``: UAR, accuracy and their interval on speakers a run has not seen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from sertool.cli.console import OUTPUT, print_json, print_status, progress_bar, spectrogram_progress

if TYPE_CHECKING:
    from sertool.run import Run


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder, or the folder above the folds of one.")],
    part: Annotated[str, typer.Option(help="Part of the split: test, validation or train.")] = "test",
    json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Evaluate a run on unseen speakers; several folds are pooled into one result.

    Writes metrics.json and predictions.csv into the run (and, for folds, into the folder above them).

    Example: sertool evaluate runs/loso
    """
    from sertool.evaluate import evaluate_run, pool, save_evaluation
    from sertool.run import load_folds

    folds = load_folds(run)
    predictions = []
    with progress_bar() as progress:
        on_features = spectrogram_progress(progress)
        for fold in progress.track(folds, description="evaluating"):
            predictions.append(evaluate_run(fold, part, on_features))
            entry = save_evaluation(fold.path, part, predictions[-1], fold.split_hash)
    if folds[0].path != run:
        entry = save_evaluation(run, part, pool(predictions), folds[0].split_hash)
        _warn_of_unfinished(folds)
    if json:
        print_json(entry)
    else:
        _print(entry, f"{run}, {part} speakers")


def _warn_of_unfinished(folds: list[Run]) -> None:
    finished = {fold.recipe.data.fold for fold in folds}
    missing = [str(number) for number in range(1, len(folds[0].split.folds) + 1) if number not in finished]
    if missing:
        print_status(f"this result lacks fold {', '.join(missing)}: not trained to the end yet")


def _print(entry: dict[str, Any], title: str) -> None:
    labels = entry["labels"]
    table = Table(title=f"{title}: confusion (rows: truth)")
    for column in ("", *labels, "recall"):
        table.add_column(column, justify="left" if not column else "right")
    for label, row in zip(labels, entry["confusion"], strict=True):
        recall = entry["recall"][label]
        table.add_row(label, *map(str, row), "-" if recall is None else f"{recall:.1%}")
    OUTPUT.print(table)
    interval = entry["uar_interval"]
    between = f", 95 % interval {interval[0]:.1%} to {interval[1]:.1%} over speakers" if interval else ""
    OUTPUT.print(f"UAR {entry['uar']:.1%}{between}", highlight=False)
    OUTPUT.print(f"accuracy {entry['accuracy']:.1%} of {entry['items']} clips", highlight=False)
    for kind in ("speakers", "genders"):
        shares = "  ".join(f"{name} {uar:.1%}" for name, uar in entry[kind].items())
        OUTPUT.print(f"UAR by {kind[:-1]}: {shares or 'unknown'}", highlight=False)
